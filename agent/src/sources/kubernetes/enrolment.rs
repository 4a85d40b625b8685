//! Which pods take part in the mesh, and the moment in between.
//!
//! Every node sees a changed label at its own time. So that a running pod can be enrolled, or un-enrolled, without a lost
//! connection, its own node captures it from the moment the label is seen until [`GRACE`] after it is gone, and everybody goes
//! on to dial it in plaintext until [`GRACE`] after the label came, and stops dialling the tunnel as soon as it is gone. A pod
//! that has had its label ever since it is known is in at once.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::records::{Choice, Key, NamespaceRecord, PodRecord};

/// How far apart two nodes may see the same change.
pub(super) const GRACE: Duration = Duration::from_secs(2);

/// Where a pod is on its way into the mesh, or out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not in the mesh.
    Out,
    /// Captured by its node, dialled in plaintext.
    Between,
    /// In the mesh.
    In,
}

/// Do the labels of the pod and its namespace ask for it, and is it possible?
pub(super) fn wanted(pod: &PodRecord, namespace: Option<&NamespaceRecord>) -> bool {
    let choice = pod.choice.or_else(|| namespace.and_then(|n| n.choice));
    choice == Some(Choice::In) && !pod.host_network && !pod.occupied
}

/// Remembers since when pods are wanted.
#[derive(Debug, Default)]
pub(super) struct Enrolments {
    pods: HashMap<Key, Seen>,
}

#[derive(Debug)]
struct Seen {
    /// Another pod under the same name is a new one.
    uid: Arc<str>,
    wanted: bool,
    /// When that changed, for as long as it matters.
    changed: Option<Instant>,
    /// Of the pass it was last seen in.
    pass: u64,
}

/// One look at all pods.
pub(super) struct Pass<'a> {
    enrolments: &'a mut Enrolments,
    now: Instant,
    number: u64,
    /// When the next phase ends.
    pub(super) due: Option<Instant>,
}

impl Enrolments {
    /// Begins a look at all pods; number them upwards.
    pub(super) fn pass(&mut self, number: u64, now: Instant) -> Pass<'_> {
        Pass { enrolments: self, now, number, due: None }
    }
}

impl Pass<'_> {
    /// The phase of a pod.
    pub(super) fn phase(&mut self, key: &Key, pod: &PodRecord, wanted: bool) -> Phase {
        let (now, number) = (self.now, self.number);
        let steady = if wanted { Phase::In } else { Phase::Out };
        let Some(seen) = self.enrolments.pods.get_mut(key).filter(|seen| seen.uid == pod.uid) else {
            let seen = Seen { uid: Arc::clone(&pod.uid), wanted, changed: None, pass: number };
            self.enrolments.pods.insert(key.clone(), seen);
            return steady;
        };
        seen.pass = number;
        if seen.wanted != wanted {
            // Without an address nobody has dialled it yet.
            seen.changed = (!pod.addresses.is_empty()).then_some(now);
            seen.wanted = wanted;
        }
        match seen.changed.map(|changed| changed + GRACE) {
            Some(end) if now < end => {
                self.due = Some(self.due.map_or(end, |due| due.min(end)));
                Phase::Between
            }
            _ => {
                seen.changed = None;
                steady
            }
        }
    }

    /// Ends the look: who was not seen is forgotten.
    pub(super) fn finish(self) -> Option<Instant> {
        let number = self.number;
        self.enrolments.pods.retain(|_, seen| seen.pass == number);
        self.due
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Enrolments, GRACE, Phase, wanted};
    use crate::sources::kubernetes::{
        records::{Choice, Key, NamespaceRecord},
        tests::support::pod,
    };

    #[test]
    fn labels_of_the_pod_win_over_those_of_its_namespace() {
        let namespace = |choice| NamespaceRecord { choice, ..NamespaceRecord::default() };
        for (of_pod, of_namespace, expected) in [
            (None, None, false),
            (Some(Choice::In), None, true),
            (None, Some(Choice::In), true),
            (Some(Choice::Out), Some(Choice::In), false),
            (Some(Choice::In), Some(Choice::Out), true),
        ] {
            let mut pod = pod("u", "10.0.0.1");
            pod.choice = of_pod;
            assert_eq!(wanted(&pod, Some(&namespace(of_namespace))), expected, "{of_pod:?} {of_namespace:?}");
            pod.host_network = true;
            assert!(!wanted(&pod, Some(&namespace(of_namespace))), "host network");
            (pod.host_network, pod.occupied) = (false, true);
            assert!(!wanted(&pod, Some(&namespace(of_namespace))), "sidecar");
        }
    }

    #[test]
    fn a_change_passes_through_a_time_in_between_and_a_new_pod_does_not() {
        let key = Key { namespace: "n".into(), name: "p".into() };
        let (mut enrolments, start) = (Enrolments::default(), Instant::now());
        let mut number = 0;
        let mut at = |pod: &_, wanted, after| {
            number += 1;
            let mut pass = enrolments.pass(number, start + after);
            let phase = pass.phase(&key, pod, wanted);
            (phase, pass.finish())
        };
        let (first, second) = (pod("one", "10.0.0.1"), pod("two", "10.0.0.1"));
        let second_ = Duration::from_secs(1);
        assert_eq!(at(&first, false, Duration::ZERO), (Phase::Out, None));
        assert_eq!(at(&first, true, second_), (Phase::Between, Some(start + second_ + GRACE)));
        assert_eq!(at(&first, true, second_ + GRACE), (Phase::In, None));
        assert_eq!(at(&first, false, second_ * 9), (Phase::Between, Some(start + second_ * 9 + GRACE)));
        assert_eq!(at(&first, false, second_ * 9 + GRACE), (Phase::Out, None));
        assert_eq!(at(&second, true, second_ * 20), (Phase::In, None), "another pod of that name");
    }
}
