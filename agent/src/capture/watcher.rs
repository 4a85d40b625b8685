//! Guards the interfaces a pod gets after it was enrolled.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{sync::oneshot, time::sleep};

use super::{
    CaptureError,
    interfaces::{Change, Interface, Watch},
    links,
    loader::Objects,
    netns::Netns,
    node_guard::NodeGuard,
    tc::{self, Method, Programs},
};

/// Between attempts on an interface: the first pause, which doubles, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

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
    /// Guards from the node's side.
    pub node_guard: Arc<NodeGuard>,
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
pub async fn run(attacher: Attacher, mut programs: Programs, mut watch: Watch, mut stopped: oneshot::Receiver<()>) {
    // Interfaces without programs, with the number of attempts made.
    let mut bare: BTreeMap<u32, (Interface, u32)> = BTreeMap::new();
    loop {
        let attempts = bare.values().map(|(_, attempts)| *attempts).min();
        let change = tokio::select! {
            biased;
            _ = &mut stopped => return,
            change = watch.next() => Some(change),
            () = sleep(pause(attempts.unwrap_or_default())), if attempts.is_some() => None,
        };
        match change {
            // Also one that has its programs: another name or another end may be another interface,
            // and attaching finds out.
            Some(Some(Change::New(interface))) => {
                bare.insert(interface.index, (interface, 0));
            }
            Some(Some(Change::Gone(index))) => {
                bare.remove(&index);
                if let Err(e) = gone(&attacher, index).await {
                    tracing::error!(pod = attacher.pod_id, interface = index, error = %e, "cannot remove pins");
                }
            }
            Some(None) => {
                tracing::error!(
                    pod = attacher.pod_id,
                    namespace = %attacher.netns.path().display(),
                    "cannot watch interfaces any more; new ones are not guarded until the pod is enrolled again"
                );
                return;
            }
            // It is time to try again.
            None => {}
        }
        attach(&attacher, &mut programs, &mut bare).await;
    }
}

/// The pod's namespace has lost an interface. Root in the pod can move one elsewhere and go on
/// using it, so its programs stay as long as it exists.
async fn gone(attacher: &Attacher, index: u32) -> Result<(), CaptureError> {
    let Attacher { objects, pod_id, node_guard, .. } = attacher;
    links::interface_gone(objects.layout(), *pod_id, index)?;
    // Of interfaces that moved earlier and do not exist any more.
    links::remove_dead(objects.layout(), Some(*pod_id))?;
    node_guard.interface_gone(*pod_id, index).await
}

/// How long to wait after so many attempts on an interface.
fn pause(attempts: u32) -> Duration {
    PAUSE.0.saturating_mul(1 << attempts.saturating_sub(1).min(31)).min(PAUSE.1)
}

/// Tries every interface that has no programs yet. What fails is tried again, as long as the interface is there: plaintext could leave
/// by it.
async fn attach(attacher: &Attacher, programs: &mut Programs, bare: &mut BTreeMap<u32, (Interface, u32)>) {
    let Attacher { objects, netns, method, pod_id, node_guard, failures } = attacher;
    for (index, (interface, attempts)) in std::mem::take(bare) {
        let name = interface.name.clone();
        let one = || vec![interface.clone()];
        // The node's side first: the pod cannot go around that guard. One that fails does not keep
        // the other away.
        let outside = node_guard.attach(netns, *pod_id, one()).await;
        let inside = tc::attach(objects, netns, *method, *pod_id, one(), programs).await;
        match outside.and(inside) {
            Ok(()) => tracing::debug!(pod = pod_id, interface = name, index, "guarded a new interface"),
            Err(e) => {
                failures.fetch_add(1, Relaxed);
                let attempts = attempts.saturating_add(1);
                tracing::error!(
                    pod = pod_id, interface = name, index, attempts, error = %e,
                    "an interface of an enrolled pod is not guarded; trying again"
                );
                bare.insert(index, (interface, attempts));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit() {
        assert_eq!([1, 2, 3, 6, 40, u32::MAX].map(|attempts| pause(attempts).as_secs()), [1, 2, 4, 30, 30, 30]);
    }
}
