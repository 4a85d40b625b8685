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

/// What a pod and its namespace say about taking part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// A label asks for it, and nothing stands in the way.
    In,
    /// They say that the pod stays out: a decision, also when a label was taken away.
    Out,
    /// The pod leaves it to its namespace, whose object is not there. That is no decision.
    Unknown,
}

/// What the labels of the pod and its namespace ask for, as far as it is possible.
pub(super) fn wish(pod: &PodRecord, namespace: Option<&NamespaceRecord>) -> Wish {
    if pod.unvouched.is_some() { Wish::Out } else { asked(pod, namespace) }
}

/// As [`wish`], whether the pod has an identity or not.
pub(super) fn asked(pod: &PodRecord, namespace: Option<&NamespaceRecord>) -> Wish {
    if pod.host_network || pod.occupied {
        return Wish::Out;
    }
    match (pod.choice, namespace) {
        (Some(Choice::In), _) => Wish::In,
        (None, Some(namespace)) if namespace.choice == Some(Choice::In) => Wish::In,
        (Some(Choice::Out), _) | (None, Some(_)) => Wish::Out,
        (None, None) => Wish::Unknown,
    }
}

/// Remembers which pods are wanted, and since when if that has changed.
#[derive(Debug, Default)]
pub(super) struct Enrolments {
    pods: HashMap<Key, Seen>,
    /// When being in between ends. Few pods are.
    between: HashMap<Key, Instant>,
}

#[derive(Debug)]
struct Seen {
    /// Another pod under the same name is a new one.
    uid: Arc<str>,
    wanted: bool,
}

impl Enrolments {
    /// The phase of a pod, with what its labels ask for now. While that is unknown, the pod stays
    /// where it was.
    pub(super) fn phase(&mut self, key: &Key, pod: &PodRecord, wish: Wish, now: Instant) -> Phase {
        let known = self.pods.get(key).filter(|seen| seen.uid == pod.uid).map(|seen| seen.wanted);
        let wanted = match wish {
            Wish::In => true,
            Wish::Out => false,
            Wish::Unknown => match known {
                Some(wanted) => wanted,
                // Not noted: what is said about it first holds at once.
                None => return Phase::Out,
            },
        };
        let steady = if wanted { Phase::In } else { Phase::Out };
        let Some(seen) = self.pods.get_mut(key).filter(|seen| seen.uid == pod.uid) else {
            self.between.remove(key);
            self.pods.insert(key.clone(), Seen { uid: Arc::clone(&pod.uid), wanted });
            return steady;
        };
        if seen.wanted != wanted {
            seen.wanted = wanted;
            // Without an address nobody has dialled it yet.
            if pod.addresses.is_empty() {
                self.between.remove(key);
            } else {
                self.between.insert(key.clone(), now + GRACE);
            }
        }
        match self.between.get(key) {
            Some(end) if now < *end => Phase::Between,
            Some(_) => {
                self.between.remove(key);
                steady
            }
            None => steady,
        }
    }

    /// Forgets a pod that is gone.
    pub(super) fn forget(&mut self, key: &Key) {
        self.pods.remove(key);
        self.between.remove(key);
    }

    /// Forgets all pods but these.
    pub(super) fn retain(&mut self, is_there: impl Fn(&Key) -> bool) {
        self.pods.retain(|key, _| is_there(key));
        self.between.retain(|key, _| is_there(key));
    }

    /// Pods for which being in between has ended, until they are looked at.
    pub(super) fn ended(&self, now: Instant) -> impl Iterator<Item = &Key> {
        self.between.iter().filter(move |(_, end)| **end <= now).map(|(key, _)| key)
    }

    /// When the next pod ends being in between.
    pub(super) fn due(&self) -> Option<Instant> {
        self.between.values().min().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Enrolments, GRACE, Phase, Wish, asked, wish};
    use crate::{
        pod_identity::NoIdentity,
        sources::kubernetes::{
            records::{Choice, Key, NamespaceRecord, Unvouched},
            tests::support::pod,
        },
    };

    #[test]
    fn labels_of_the_pod_win_over_those_of_its_namespace() {
        let namespace = |choice| NamespaceRecord { choice, ..NamespaceRecord::default() };
        for (of_pod, of_namespace, expected) in [
            (None, None, Wish::Out),
            (Some(Choice::In), None, Wish::In),
            (None, Some(Choice::In), Wish::In),
            (Some(Choice::Out), Some(Choice::In), Wish::Out),
            (Some(Choice::In), Some(Choice::Out), Wish::In),
        ] {
            let mut pod = pod("u", "10.0.0.1");
            pod.choice = of_pod;
            assert_eq!(wish(&pod, Some(&namespace(of_namespace))), expected, "{of_pod:?} {of_namespace:?}");
            pod.host_network = true;
            assert_eq!(wish(&pod, Some(&namespace(of_namespace))), Wish::Out, "host network");
            (pod.host_network, pod.occupied) = (false, true);
            assert_eq!(wish(&pod, Some(&namespace(of_namespace))), Wish::Out, "sidecar");
            pod.occupied = false;
            pod.unvouched = Some(Box::new(Unvouched { why: NoIdentity::Static, uid: None }));
            assert_eq!(wish(&pod, Some(&namespace(of_namespace))), Wish::Out, "no identity");
            assert_eq!(asked(&pod, Some(&namespace(of_namespace))), expected, "{of_pod:?} {of_namespace:?}");
        }
        assert_eq!(wish(&pod("u", "10.0.0.1"), None), Wish::Unknown, "the namespace's object is not there");
    }

    #[test]
    fn a_pod_whose_namespace_vanished_stays_where_it_was() {
        let key = Key { namespace: "n".into(), name: "p".into() };
        let (mut enrolments, now) = (Enrolments::default(), Instant::now());
        let (inside, later) = (pod("one", "10.0.0.1"), pod("two", "10.0.0.1"));
        for (wish, phase) in [(Wish::In, Phase::In), (Wish::Unknown, Phase::In), (Wish::In, Phase::In)] {
            assert_eq!((enrolments.phase(&key, &inside, wish, now), enrolments.due()), (phase, None), "{wish:?}");
        }
        for (wish, phase) in [(Wish::Unknown, Phase::Out), (Wish::In, Phase::In)] {
            assert_eq!((enrolments.phase(&key, &later, wish, now), enrolments.due()), (phase, None), "new, {wish:?}");
        }
    }

    #[test]
    fn a_change_passes_through_a_time_in_between_and_a_new_pod_does_not() {
        let key = Key { namespace: "n".into(), name: "p".into() };
        let (mut enrolments, start) = (Enrolments::default(), Instant::now());
        let mut at = |pod: &_, wanted: bool, after| {
            let wish = if wanted { Wish::In } else { Wish::Out };
            let phase = enrolments.phase(&key, pod, wish, start + after);
            (phase, enrolments.due())
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
