//! Pods whose namespaces the CNI plugin hands over before they run, and what becomes of them.
//!
//! The plugin's request holds the pod's start up. It reaches the owner of the state as one more change; after each snapshot the
//! owner says on a board how every such pod stands.

use std::{
    collections::HashMap,
    fs::File,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{mpsc, watch};

use super::{
    cluster::News,
    records::{Key, PodRecord},
};
use crate::mesh::WorkloadKey;

/// A pod's network namespace with its addresses.
#[derive(Debug)]
pub struct Attachment {
    /// The pod.
    pub pod: WorkloadKey,
    /// Its uid; runtimes before containerd 1.6 do not tell it.
    pub uid: Option<String>,
    /// The runtime's number for the pod's sandbox: a pod that gets another one has another namespace.
    pub container: String,
    /// The namespace, held open.
    pub namespace: File,
    /// Addresses on its interfaces.
    pub addresses: Vec<IpAddr>,
}

/// How a pod that was handed over stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The API server has not told of it yet.
    Unknown,
    /// It takes no part.
    Outside,
    /// It is a workload of the current snapshot.
    Inside,
    /// It should take part, and cannot.
    Impossible(String),
}

/// A handle for handing pods over. Clones are the same.
#[derive(Debug, Clone)]
pub struct Attachments {
    news: mpsc::Sender<News>,
    board: Board,
}

impl Attachments {
    pub(super) fn new(news: mpsc::Sender<News>, board: Board) -> Self {
        Self { news, board }
    }

    /// Hands a pod over. `false` when the source has ended.
    pub async fn add(&self, attachment: Attachment) -> bool {
        self.board.expect(&attachment);
        self.news.send(News::Attached(attachment)).await.is_ok()
    }

    /// The sandbox is gone. Unknown ones are no error.
    pub async fn remove(&self, container: String) {
        self.board.lock().remove(&container);
        // Without an owner there is nothing to forget.
        let _ = self.news.send(News::Detached(container)).await;
    }

    /// Sandboxes that were handed over.
    pub fn containers(&self) -> Vec<String> {
        self.board.lock().keys().cloned().collect()
    }

    /// The first verdict on a sandbox that is not [`Verdict::Unknown`]. Unknown when the source ends, or it was removed.
    pub async fn verdict(&self, container: &str) -> Verdict {
        let mut looks = self.board.looks.subscribe();
        loop {
            looks.borrow_and_update();
            let known = self.board.lock().get(container).cloned();
            match known {
                None => return Verdict::Unknown,
                Some(Verdict::Unknown) => {}
                Some(verdict) => return verdict,
            }
            if looks.changed().await.is_err() {
                return Verdict::Unknown;
            }
        }
    }
}

/// Verdicts by sandbox.
#[derive(Debug, Clone, Default)]
pub(super) struct Board {
    verdicts: Arc<Mutex<HashMap<String, Verdict>>>,
    looks: Arc<watch::Sender<()>>,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Verdict>> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is something to be said of this sandbox.
    pub(super) fn expect(&self, attachment: &Attachment) {
        self.lock().insert(attachment.container.clone(), Verdict::Unknown);
    }

    /// Says how sandboxes stand. Those that were removed meanwhile stay removed.
    pub(super) fn say(&self, verdicts: impl Iterator<Item = (String, Verdict)>) {
        {
            let mut board = self.lock();
            for (container, verdict) in verdicts {
                if let Some(place) = board.get_mut(&container) {
                    *place = verdict;
                }
            }
        }
        self.looks.send_replace(());
    }
}

/// What the owner remembers of a pod that was handed over.
#[derive(Debug, Clone)]
pub(super) struct Attached {
    pub(super) uid: Option<String>,
    pub(super) container: String,
    pub(super) addresses: Vec<IpAddr>,
}

impl Attached {
    /// What is remembered of it; and the namespace.
    pub(super) fn of(attachment: Attachment) -> (Key, Self, File) {
        let Attachment { pod, uid, container, namespace, addresses } = attachment;
        let addresses = addresses.into_iter().map(|a| a.to_canonical()).collect();
        ((&pod).into(), Self { uid, container, addresses }, namespace)
    }

    /// Is this the sandbox of that pod? A static pod's has the UID that its kubelet uses.
    pub(super) fn is(&self, pod: &PodRecord) -> bool {
        let of_static = pod.unvouched.as_ref().and_then(|unvouched| unvouched.uid.as_deref());
        self.uid.as_deref().is_none_or(|of| *of == *pod.uid || Some(of) == of_static)
    }
}

impl From<&WorkloadKey> for Key {
    fn from(key: &WorkloadKey) -> Self {
        Self { namespace: Arc::clone(&key.namespace), name: Arc::clone(&key.name) }
    }
}
