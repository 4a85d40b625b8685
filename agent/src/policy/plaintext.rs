//! What can be said of plaintext connections from their destination alone, for programs that see a SYN and no more.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use super::PolicySet;
use crate::mesh::{InboundMode, Snapshot, Workload};

/// What to do with a plaintext connection to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Let it in, wherever it comes from.
    Allow,
    /// Refuse it, wherever it comes from.
    Deny,
    /// It depends: evaluate each one.
    Evaluate,
}

/// Dispositions of all ports of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaintextRules {
    /// Of every port that is not listed.
    pub default: Disposition,
    /// Ports with another one.
    pub ports: BTreeMap<u16, Disposition>,
}

impl PlaintextRules {
    /// The disposition of a port.
    pub fn of(&self, port: u16) -> Disposition {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}

/// Puts exclusions, modes and policies together: a port that is excluded is let in by nobody's decision, one that is
/// STRICT is refused, on others `policies` (those of `workload`) decide.
pub fn plaintext_rules(snapshot: &Snapshot, workload: &Workload, policies: &PolicySet) -> PlaintextRules {
    let disposition = |port| {
        if is_excluded(snapshot, workload, port) {
            return Disposition::Allow;
        }
        if workload.mode_of(port) == InboundMode::Strict {
            return Disposition::Deny;
        }
        let of = |address: &IpAddr| policies.plaintext_disposition(SocketAddr::new(*address, port));
        let mut all = workload.addresses.iter().map(of);
        // Nobody connects to a workload without an address.
        let Some(first) = all.next() else { return Disposition::Deny };
        if all.all(|other| other == first) { first } else { Disposition::Evaluate }
    };
    let mut named: BTreeSet<u16> = policies.ports();
    named.extend(workload.port_modes.iter().map(|m| m.port));
    named.extend(excluded(snapshot, workload));
    // If every port is named, the default is nobody's.
    let unnamed = (1..=u16::MAX).find(|port| !named.contains(port));
    let default = unnamed.map_or(Disposition::Deny, disposition);
    let ports = named.into_iter().map(|port| (port, disposition(port))).filter(|(_, d)| *d != default).collect();
    PlaintextRules { default, ports }
}

/// Is plaintext let in on `port` whatever modes and policies say?
pub(super) fn is_excluded(snapshot: &Snapshot, workload: &Workload, port: u16) -> bool {
    excluded(snapshot, workload).any(|p| p == port)
}

fn excluded<'a>(snapshot: &'a Snapshot, workload: &'a Workload) -> impl Iterator<Item = u16> + 'a {
    let own = workload.local.iter().flat_map(|local| &local.exclude.inbound_ports);
    snapshot.settings.exclude.inbound_ports.iter().chain(own).copied()
}
