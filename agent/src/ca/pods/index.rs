//! Which service accounts have pods on which node.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use k8s_openapi::api::core::v1::Pod;

/// A pod, as far as it matters who may get its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    node: Arc<str>,
    account: Account,
}

/// Namespace and service account.
pub(super) type Account = (Arc<str>, Arc<str>);

impl Entry {
    /// `None` for pods that run nowhere: not scheduled yet, or finished.
    pub(super) fn of(pod: &Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let finished = |phase: &str| matches!(phase, "Succeeded" | "Failed");
        if pod.status.as_ref().and_then(|s| s.phase.as_deref()).is_some_and(finished) {
            return None;
        }
        let node = spec.node_name.as_deref().filter(|n| !n.is_empty())?;
        let namespace = pod.metadata.namespace.as_deref()?;
        // The API server fills it in; `default` is what it fills in.
        let account = spec.service_account_name.as_deref().filter(|a| !a.is_empty()).unwrap_or("default");
        Some(Self { node: node.into(), account: (namespace.into(), account.into()) })
    }

    /// Whose it is, if it is on this node.
    pub(super) fn on(self, node: &str) -> Option<Account> {
        (*self.node == *node).then_some(self.account)
    }
}

/// All pods, at most `limit`. Those beyond are asked for one by one.
pub(super) struct Index {
    inner: Mutex<Inner>,
    limit: usize,
}

#[derive(Default)]
struct Inner {
    /// By namespace and name.
    pods: HashMap<(Arc<str>, Arc<str>), Entry>,
    /// How many pods there are of an account on a node.
    nodes: HashMap<Arc<str>, HashMap<Account, usize>>,
    /// The watch has told everything up to now.
    fresh: bool,
    /// Filled between `Init` and `InitDone`.
    next: Option<Box<Inner>>,
}

impl Index {
    pub(super) fn new(limit: usize) -> Self {
        Self { inner: Mutex::default(), limit }
    }

    /// Is a pod of this account on the node? `None` when that is not known: the watch broke or has not begun.
    pub(super) fn runs(&self, node: &str, namespace: &str, account: &str) -> Option<bool> {
        let inner = self.lock();
        inner.fresh.then(|| {
            let accounts = inner.nodes.get(node);
            accounts.is_some_and(|a| a.contains_key(&(Arc::from(namespace), Arc::from(account))))
        })
    }

    pub(super) fn len(&self) -> usize {
        self.lock().pods.len()
    }

    pub(super) fn begin(&self) {
        self.lock().next = Some(Box::default());
    }

    pub(super) fn listed(&self, pod: &Pod) {
        if let Some(next) = &mut self.lock().next {
            next.apply(pod, self.limit);
        }
    }

    pub(super) fn done(&self) {
        let mut inner = self.lock();
        if let Some(next) = inner.next.take() {
            *inner = *next;
        }
        inner.fresh = true;
    }

    pub(super) fn apply(&self, pod: &Pod) {
        let mut inner = self.lock();
        inner.fresh = true;
        inner.apply(pod, self.limit);
    }

    pub(super) fn delete(&self, pod: &Pod) {
        self.lock().delete(pod);
    }

    /// What it says may be out of date from now on.
    pub(super) fn stale(&self) {
        self.lock().fresh = false;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn apply(&mut self, pod: &Pod, limit: usize) {
        let (Some(key), Some(mut entry)) = (key(pod), Entry::of(pod)) else { return self.delete(pod) };
        if self.pods.get(&key) == Some(&entry) {
            return;
        }
        self.delete(pod);
        if self.pods.len() >= limit {
            return;
        }
        // The same few names in thousands of pods share their memory.
        if let Some((node, accounts)) = self.nodes.get_key_value(&entry.node) {
            entry.node = Arc::clone(node);
            if let Some((account, _)) = accounts.get_key_value(&entry.account) {
                entry.account = account.clone();
            }
        }
        let accounts = self.nodes.entry(Arc::clone(&entry.node)).or_default();
        *accounts.entry(entry.account.clone()).or_default() += 1;
        self.pods.insert(key, entry);
    }

    fn delete(&mut self, pod: &Pod) {
        let Some(entry) = key(pod).and_then(|key| self.pods.remove(&key)) else { return };
        let Some(accounts) = self.nodes.get_mut(&entry.node) else { return };
        if let Some(count) = accounts.get_mut(&entry.account) {
            *count -= 1;
            if *count == 0 {
                accounts.remove(&entry.account);
            }
        }
        if accounts.is_empty() {
            self.nodes.remove(&entry.node);
        }
    }
}

fn key(pod: &Pod) -> Option<(Arc<str>, Arc<str>)> {
    Some((pod.metadata.namespace.as_deref()?.into(), pod.metadata.name.as_deref()?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::tests::cluster::pod;

    #[test]
    fn pods_are_counted_per_account_and_node() {
        let index = Index::new(3);
        assert_eq!(index.runs("n1", "a", "web"), None, "nothing is known yet");
        index.begin();
        index.listed(&pod("a", "web-1", "web", "n1"));
        index.listed(&pod("a", "web-2", "web", "n1"));
        assert_eq!(index.runs("n1", "a", "web"), None, "half a list says nothing");
        index.done();
        assert_eq!(index.runs("n1", "a", "web"), Some(true));
        assert_eq!(index.runs("n2", "a", "web"), Some(false));
        assert_eq!(index.runs("n1", "b", "web"), Some(false));

        index.delete(&pod("a", "web-1", "web", "n1"));
        assert_eq!(index.runs("n1", "a", "web"), Some(true), "one is left");
        let mut finished = pod("a", "web-2", "web", "n1");
        finished.status.as_mut().unwrap().phase = Some("Succeeded".into());
        index.apply(&finished);
        assert_eq!(index.runs("n1", "a", "web"), Some(false), "a finished pod needs no identity");
        assert_eq!((index.len(), index.lock().nodes.len()), (0, 0));

        // The same name elsewhere: a StatefulSet's pod that was scheduled anew.
        index.apply(&pod("a", "db-0", "db", "n1"));
        index.apply(&pod("a", "db-0", "db", "n2"));
        assert_eq!((index.runs("n1", "a", "db"), index.runs("n2", "a", "db")), (Some(false), Some(true)));

        for name in ["p1", "p2", "p3"] {
            index.apply(&pod("a", name, name, "n1"));
        }
        assert_eq!((index.len(), index.runs("n1", "a", "p3")), (3, Some(false)), "bounded");
        index.stale();
        assert_eq!(index.runs("n2", "a", "db"), None);
    }

    #[test]
    fn a_list_replaces_what_was_known() {
        let index = Index::new(10);
        index.apply(&pod("a", "old", "old", "n1"));
        index.begin();
        index.listed(&pod("a", "new", "new", "n1"));
        index.done();
        assert_eq!((index.runs("n1", "a", "old"), index.runs("n1", "a", "new")), (Some(false), Some(true)));
    }
}
