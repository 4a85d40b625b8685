//! Addresses that nobody may dial, by the pods that have them.

use std::{collections::HashMap, net::IpAddr};

use super::{
    index::Index,
    pods::{Held, workload_key},
    records::Key,
};
use crate::mesh::{self, SnapshotBuilder};

/// Pods with such addresses. Few have any.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    pods: HashMap<Key, Held>,
    /// Of several pods with one address the first counts.
    by_address: Index<IpAddr, (Key, bool)>,
}

impl Holdings {
    /// Notes what is held because of a pod now.
    pub(super) fn set(&mut self, builder: &mut SnapshotBuilder, pod: &Key, held: Held) {
        if self.pods.get(pod) == Some(&held) {
            return;
        }
        if let Some(before) = self.pods.remove(pod) {
            for address in &before.addresses {
                self.by_address.remove(address, &(pod.clone(), before.awaited));
                self.tell(builder, *address);
            }
        }
        if held.addresses.is_empty() {
            return;
        }
        for address in &held.addresses {
            self.by_address.add(*address, (pod.clone(), held.awaited));
            self.tell(builder, *address);
        }
        self.pods.insert(pod.clone(), held);
    }

    fn tell(&self, builder: &mut SnapshotBuilder, address: IpAddr) {
        match self.by_address.get(&address).first() {
            Some((pod, awaited)) => {
                builder.hold(address, mesh::Held { pod: workload_key(pod), awaited: *awaited });
            }
            None => builder.release(address),
        }
    }
}
