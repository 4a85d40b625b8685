//! Which service accounts have pods on which node.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use k8s_openapi::api::core::v1::Pod;

use crate::pod_identity::{self, NoIdentity};

/// How long after the end of its grace period a deleted pod keeps its identity. Its processes have been killed by then; an
/// object that stays longer is one whose kubelet, or a finalizer, does not let go of it.
const DELETED: Duration = Duration::from_mins(5);

/// A pod, as far as it matters who may get its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    node: Arc<str>,
    account: Account,
}

/// Namespace and service account.
pub(super) type Account = (Arc<str>, Arc<str>);

/// Why nothing is signed for a pod, although it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::ca) enum Unsigned {
    /// It has no identity.
    #[error(transparent)]
    NoIdentity(#[from] NoIdentity),
    /// It is in no mesh: agents never enrol it, and its traffic is the node's.
    #[error("pods with hostNetwork are not in the mesh, so nothing is signed for them")]
    HostNetwork,
    /// Its object outlived it.
    #[error("its grace period ended more than five minutes ago and it is still not gone; delete it, or what holds it")]
    Deleted,
}

impl Unsigned {
    /// A word for logs and metrics.
    pub(in crate::ca) fn label(self) -> &'static str {
        match self {
            Self::NoIdentity(NoIdentity::Static) => "static-pod",
            Self::NoIdentity(NoIdentity::NoAccount) => "no-service-account",
            Self::NoIdentity(NoIdentity::NoUid) => "no-uid",
            Self::HostNetwork => "host-network",
            Self::Deleted => "deleted-pod",
        }
    }
}

/// A pod that nothing is signed for, and that may be meant all the same.
#[derive(Debug)]
pub(super) struct Without {
    namespace: Arc<str>,
    account: Option<Arc<str>>,
    pub(super) why: Unsigned,
}

impl Without {
    /// Would the account be its own, if it had an identity?
    pub(super) fn is_meant(&self, wanted: &Account) -> bool {
        let own = self.account.as_deref().unwrap_or("default");
        (&*self.namespace, own) == (&*wanted.0, &*wanted.1)
    }
}

/// What a pod of a node means to whoever signs.
pub(super) enum Standing {
    /// Its agent may have its identity.
    Signed(Entry),
    /// It may not.
    Unsigned(Arc<str>, Without),
    /// The pod does not run: not bound to a node yet, or finished.
    Nowhere,
}

impl Standing {
    /// Of this pod, at this moment.
    pub(super) fn of(pod: &Pod, now: SystemTime) -> Self {
        let finished = |phase: &str| matches!(phase, "Succeeded" | "Failed");
        if pod.status.as_ref().and_then(|s| s.phase.as_deref()).is_some_and(finished) {
            return Self::Nowhere;
        }
        let Some(spec) = &pod.spec else { return Self::Nowhere };
        let node: Option<Arc<str>> = spec.node_name.as_deref().filter(|n| !n.is_empty()).map(Into::into);
        let (Some(node), Some(namespace)) = (node, pod.metadata.namespace.as_deref()) else { return Self::Nowhere };
        let named = spec.service_account_name.as_deref();
        let judged = pod_identity::account(&pod.metadata, named).map_err(Unsigned::from).and_then(|account| {
            if spec.host_network == Some(true) {
                return Err(Unsigned::HostNetwork);
            }
            if ends(pod).is_some_and(|end| end + DELETED <= now) { Err(Unsigned::Deleted) } else { Ok(account) }
        });
        match judged {
            Ok(account) => Self::Signed(Entry { node, account: (namespace.into(), account.into()) }),
            Err(why) => {
                let account = named.filter(|a| !a.is_empty()).map(Into::into);
                Self::Unsigned(node, Without { namespace: namespace.into(), account, why })
            }
        }
    }
}

/// When the grace period of a deleted pod ends.
fn ends(pod: &Pod) -> Option<SystemTime> {
    let end = pod.metadata.deletion_timestamp.as_ref()?.0.as_second();
    Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(end).unwrap_or_default()))
}

impl Entry {
    /// `None` for pods that the index does not answer for: nothing is signed for them, or, of a pod that ends, not for much
    /// longer. Those are asked about one by one.
    fn of(pod: &Pod) -> Option<Self> {
        match Standing::of(pod, SystemTime::now()) {
            Standing::Signed(entry) if pod.metadata.deletion_timestamp.is_none() => Some(entry),
            _ => None,
        }
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
