//! What a destination becomes. Pure: a snapshot and an address in, a plan out.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use rand::seq::IndexedRandom;

use crate::{
    mesh::{Protocol, Resolution, Snapshot, SpiffeId, Workload},
    telemetry::RefusalReason,
};

/// Endpoints tried for one connection: the first choice and one other.
const MAX_CANDIDATES: usize = 2;

/// One place a connection may go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// A workload in the mesh, through the tunnel.
    Tunnel {
        /// Who must answer.
        identity: SpiffeId,
        /// The workload's address and the application's port.
        destination: SocketAddr,
    },
    /// Plain TCP.
    Plain(SocketAddr),
}

/// What to do with an outbound connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// In the order they are tried; never empty.
    pub targets: Vec<Target>,
    /// Host name when a VIP was dialled.
    pub service: Option<Arc<str>>,
}

/// Decides where `destination` goes. [`RefusalReason::EndpointUnknown`] says that another snapshot
/// may know.
pub(super) fn plan(mesh: &Snapshot, destination: SocketAddr) -> Result<Plan, RefusalReason> {
    match mesh.resolve(destination.ip()) {
        Resolution::Held(held) if held.awaited => Err(RefusalReason::EndpointUnknown),
        Resolution::Held(_) => Err(RefusalReason::PlaintextToMesh),
        Resolution::Unknown => Ok(Plan { targets: vec![Target::Plain(destination)], service: None }),
        Resolution::Workload(workload) => {
            let target = target(&workload, destination.ip(), destination.port())?;
            Ok(Plan { targets: vec![target], service: None })
        }
        Resolution::Service(service) => {
            let usable: Vec<_> = service
                .endpoints
                .iter()
                .filter_map(|e| target(&e.workload, destination.ip(), service.target_port(e, destination.port())?).ok())
                .collect();
            let targets: Vec<_> = usable.choose_multiple(&mut rand::rng(), MAX_CANDIDATES).cloned().collect();
            if targets.is_empty() {
                let known = service.awaited.is_none();
                return Err(if known { RefusalReason::NoEndpoint } else { RefusalReason::EndpointUnknown });
            }
            Ok(Plan { targets, service: Some(Arc::clone(&service.hostname)) })
        }
    }
}

/// How `workload` is reached on `port`, preferably by an address of the family that was dialled.
fn target(workload: &Workload, dialled: IpAddr, port: u16) -> Result<Target, RefusalReason> {
    let dialled = dialled.to_canonical();
    let address = workload
        .addresses
        .iter()
        .find(|a| **a == dialled)
        .or_else(|| workload.addresses.iter().find(|a| a.is_ipv4() == dialled.is_ipv4()))
        .or_else(|| workload.addresses.first())
        .ok_or(RefusalReason::NoEndpoint)?;
    let destination = SocketAddr::new(*address, port);
    match workload.protocol {
        Protocol::Plain => Ok(Target::Plain(destination)),
        Protocol::Underpass if underpass_abi::is_agent_port(port) => Err(RefusalReason::AgentPort),
        Protocol::Underpass => Ok(Target::Tunnel { identity: workload.identity.clone(), destination }),
    }
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
