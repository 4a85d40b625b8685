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
    interfaces::{Change, Interface, Watch},
    loader::Objects,
    netns::Netns,
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
            Some(Some(Change::New(interface))) if is_bare(&attacher, &interface) => {
                bare.insert(interface.index, (interface, 0));
            }
            Some(Some(Change::Gone(index))) => {
                bare.remove(&index);
                if let Err(e) = tc::unpin(&attacher.objects, attacher.pod_id, Some(index)) {
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
            // It has its programs, or it is time to try again.
            Some(Some(Change::New(_))) | None => {}
        }
        attach(&attacher, &mut programs, &mut bare).await;
    }
}

fn is_bare(attacher: &Attacher, interface: &Interface) -> bool {
    !tc::is_attached(&attacher.objects, attacher.method, attacher.pod_id, interface)
}

/// How long to wait after so many attempts on an interface.
fn pause(attempts: u32) -> Duration {
    PAUSE.0.saturating_mul(1 << attempts.saturating_sub(1).min(31)).min(PAUSE.1)
}

/// Tries every interface that has no programs yet. What fails is tried again, as long as the interface is there: plaintext could leave
/// by it.
async fn attach(attacher: &Attacher, programs: &mut Programs, bare: &mut BTreeMap<u32, (Interface, u32)>) {
    let Attacher { objects, netns, method, pod_id, failures } = attacher;
    for (index, (interface, attempts)) in std::mem::take(bare) {
        let name = interface.name.clone();
        match tc::attach(objects, netns, *method, *pod_id, vec![interface.clone()], programs).await {
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
