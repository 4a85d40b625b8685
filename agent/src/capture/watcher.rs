//! Guards the interfaces a pod gets after it was enrolled.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use futures_util::FutureExt;
use tokio::sync::oneshot;

use super::{
    interfaces::{Change, Interface, Watch},
    loader::Objects,
    netns::Netns,
    tc::{self, Method},
};

/// Attempts on one interface before it is left to the next enrolment.
const ATTEMPTS: u32 = 5;

/// What attaching to a pod's interfaces takes.
pub struct Attacher {
    /// Loads the programs.
    pub objects: Arc<Objects>,
    /// The pod's namespace.
    pub netns: Arc<Netns>,
    /// tcx or clsact.
    pub method: Method,
    /// The pod's number.
    pub pod_id: u32,
    /// Counts failures.
    pub failures: Arc<AtomicU64>,
}

/// The interfaces known so far, without waiting for more.
pub fn present(watch: &mut Watch) -> Vec<Interface> {
    let mut interfaces = BTreeMap::new();
    while let Some(Some(change)) = watch.next().now_or_never() {
        match change {
            Change::New(interface) => interfaces.insert(interface.index, interface),
            Change::Gone(index) => interfaces.remove(&index),
        };
    }
    interfaces.into_values().collect()
}

/// Follows the pod's interfaces until `stopped`. A step that has begun is finished, so that after the end nothing more
/// is attached.
pub async fn run(attacher: Attacher, mut watch: Watch, mut stopped: oneshot::Receiver<()>) {
    // Interfaces without programs, with the number of attempts made.
    let mut bare: BTreeMap<u32, (Interface, u32)> = BTreeMap::new();
    loop {
        let change = tokio::select! {
            biased;
            _ = &mut stopped => return,
            change = watch.next() => change,
        };
        match change {
            Some(Change::New(interface)) => {
                if !tc::is_attached(&attacher.objects, attacher.method, attacher.pod_id, &interface) {
                    bare.insert(interface.index, (interface, 0));
                }
            }
            Some(Change::Gone(index)) => {
                bare.remove(&index);
                if let Err(e) = tc::unpin(&attacher.objects, attacher.pod_id, Some(index)) {
                    tracing::error!(pod = attacher.pod_id, interface = index, error = %e, "cannot remove pins");
                }
            }
            None => {
                tracing::error!(
                    pod = attacher.pod_id,
                    namespace = %attacher.netns.path().display(),
                    "cannot watch interfaces any more; new ones are not guarded until the pod is enrolled again"
                );
                return;
            }
        }
        attach(&attacher, &mut bare).await;
    }
}

/// Tries every interface that has no programs yet. What fails is tried again at the next change.
async fn attach(attacher: &Attacher, bare: &mut BTreeMap<u32, (Interface, u32)>) {
    let Attacher { objects, netns, method, pod_id, failures } = attacher;
    for (index, (interface, attempts)) in std::mem::take(bare) {
        let name = interface.name.clone();
        match tc::attach(objects, netns, *method, *pod_id, vec![interface.clone()]).await {
            Ok(()) => tracing::debug!(pod = pod_id, interface = name, index, "guarded a new interface"),
            Err(e) => {
                failures.fetch_add(1, Relaxed);
                let attempts = attempts + 1;
                let again = attempts < ATTEMPTS;
                tracing::error!(
                    pod = pod_id, interface = name, index, attempts, again, error = %e,
                    "an interface of an enrolled pod is not guarded"
                );
                if again {
                    bare.insert(index, (interface, attempts));
                }
            }
        }
    }
}
