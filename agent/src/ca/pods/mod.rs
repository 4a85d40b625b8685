//! Which pods run where: a watch over all of them, and questions to the API server about those that it has not told of.

mod index;

use std::{
    collections::{HashMap, HashSet},
    num::NonZeroU32,
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use futures_util::StreamExt as _;
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::ListParams,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::time::timeout;
use tracing::{debug, info};

pub(super) use self::index::Unsigned;
use self::index::{Account, Index, Standing, Without};

/// Most pods of a node that are looked through; a node has 110 by default, 500 at most in practice.
const MAX_LISTED: u32 = 1000;
/// Longest time for one question.
const API_TIMEOUT: Duration = Duration::from_secs(5);
/// Questions per second about one node, and how many at once. One answer holds for every pod of the node.
const ASKED: (NonZeroU32, NonZeroU32) = (NonZeroU32::new(2).unwrap(), NonZeroU32::new(10).unwrap());
/// How long an answer says that a pod is there; it never says for how long one is not.
const BELIEVED: Duration = Duration::from_secs(5);
/// Most nodes whose answers are kept.
const MAX_ANSWERS: usize = 8192;

/// Why it could not be found out whether a pod runs on a node.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PodsError {
    /// Too many questions about this node.
    #[error("too many requests about pods that are not known yet; try again")]
    Busy,
    /// The API server refused or was not reached.
    #[error("the API server does not say which pods run on the node; try again")]
    Api,
}

/// Whether a pod runs on a node.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// One does.
    Running,
    /// Only pods that nothing is signed for.
    Unsigned(Unsigned),
    /// None.
    Nowhere,
}

/// Pods of the cluster.
pub(super) struct Pods {
    client: Client,
    index: Index,
    asked: DefaultKeyedRateLimiter<String>,
    answers: Mutex<HashMap<String, (Instant, HashSet<Account>)>>,
}

impl Pods {
    /// At most `limit` pods are remembered.
    pub(super) fn new(client: Client, limit: usize) -> Self {
        let (rate, burst) = ASKED;
        let asked = RateLimiter::keyed(Quota::per_second(rate).allow_burst(burst));
        Self { client, index: Index::new(limit), asked, answers: Mutex::default() }
    }

    /// Does a pod of this service account run on the node?
    pub(super) async fn runs(&self, node: &str, namespace: &str, account: &str) -> Result<Found, PodsError> {
        if self.index.runs(node, namespace, account) == Some(true) {
            return Ok(Found::Running);
        }
        let wanted: Account = (namespace.into(), account.into());
        if self.answers().get(node).is_some_and(|(at, there)| at.elapsed() < BELIEVED && there.contains(&wanted)) {
            return Ok(Found::Running);
        }
        if self.asked.check_key(&node.to_owned()).is_err() {
            return Err(PodsError::Busy);
        }
        let (there, without) = self.ask(node).await?;
        let found = if there.contains(&wanted) {
            Found::Running
        } else {
            let meant = without.iter().find(|pod| pod.is_meant(&wanted));
            meant.map_or(Found::Nowhere, |pod| Found::Unsigned(pod.why))
        };
        let mut answers = self.answers();
        if answers.len() < MAX_ANSWERS || answers.contains_key(node) {
            answers.insert(node.to_owned(), (Instant::now(), there));
        }
        Ok(found)
    }

    /// Accounts of the pods on a node, and its pods that nothing is signed for.
    async fn ask(&self, node: &str) -> Result<(HashSet<Account>, Vec<Without>), PodsError> {
        let api: Api<Pod> = Api::all(self.client.clone());
        let params = ListParams::default().fields(&format!("spec.nodeName={node}")).limit(MAX_LISTED);
        match timeout(API_TIMEOUT, api.list(&params)).await {
            Ok(Ok(list)) => {
                let (now, mut there, mut without) = (SystemTime::now(), HashSet::new(), Vec::new());
                for pod in &list {
                    // The selector is the API server's to honour; what came is looked at all the same.
                    match Standing::of(pod, now) {
                        Standing::Signed(entry) => there.extend(entry.on(node)),
                        Standing::Unsigned(of, pod) if *of == *node => without.push(pod),
                        Standing::Unsigned(..) | Standing::Nowhere => {}
                    }
                }
                Ok((there, without))
            }
            Ok(Err(error)) => {
                debug!(node, %error, "listing pods");
                Err(PodsError::Api)
            }
            Err(_) => Err(PodsError::Api),
        }
    }

    /// Pods that are remembered.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// Forgets what is not needed any more.
    pub(super) fn tidy(&self) {
        self.asked.retain_recent();
        self.asked.shrink_to_fit();
        let mut answers = self.answers();
        answers.retain(|_, (at, _)| at.elapsed() < BELIEVED);
        answers.shrink_to_fit();
    }

    /// Watches until it is dropped.
    pub(super) async fn watch(&self) {
        let api: Api<Pod> = Api::all(self.client.clone());
        let mut events = pin!(watcher::watcher(api, watcher::Config::default()).default_backoff());
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Init) => self.index.begin(),
                Ok(watcher::Event::InitApply(pod)) => self.index.listed(&pod),
                Ok(watcher::Event::InitDone) => {
                    self.index.done();
                    info!(pods = self.index.len(), "pods are known");
                }
                Ok(watcher::Event::Apply(pod)) => self.index.apply(&pod),
                Ok(watcher::Event::Delete(pod)) => self.index.delete(&pod),
                Err(error) => {
                    self.index.stale();
                    debug!(%error, "the watch over pods broke; the API server is asked about each node until it is back");
                }
            }
        }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<String, (Instant, HashSet<Account>)>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
