//! What is known of a connection, and the form in which it is looked up.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::mesh::SpiffeId;

/// A connection that wants to reach a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The identity that the peer proved in the handshake. `None` for plaintext: an address proves nothing.
    pub peer: Option<&'a SpiffeId>,
    /// The peer's address; for a tunnel the checked source of its header. IPv4-mapped IPv6 counts as IPv4.
    pub source: IpAddr,
    /// The workload's own address, never a VIP, and the port that its application listens on.
    pub destination: SocketAddr,
}

/// The address of a peer.
#[derive(Clone, Copy, Debug)]
pub(super) enum SourceAddress {
    /// This one.
    Is(IpNet),
    /// Not known: what holds for some address, holds.
    Some,
    /// Not known: only what holds for every address, holds.
    Every,
}

/// A request in the form in which it is looked up.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub(super) peer: Option<Identified<'a>>,
    pub(super) source: SourceAddress,
    pub(super) destination: IpNet,
    pub(super) port: u16,
}

/// A peer that has proved who it is.
#[derive(Debug)]
pub(super) struct Identified<'a> {
    pub(super) identity: &'a SpiffeId,
    /// `TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT`, as policies write it.
    pub(super) principal: String,
    /// `NAMESPACE/ACCOUNT`.
    pub(super) account: String,
}

impl<'a> Subject<'a> {
    pub(super) fn new(request: &Request<'a>) -> Self {
        Self {
            peer: request.peer.map(Identified::new),
            source: SourceAddress::Is(request.source.to_canonical().into()),
            destination: request.destination.ip().to_canonical().into(),
            port: request.destination.port(),
        }
    }

    /// A plaintext connection from nobody knows where.
    pub(super) fn plaintext(destination: SocketAddr, source: SourceAddress) -> Self {
        Self { peer: None, source, destination: destination.ip().to_canonical().into(), port: destination.port() }
    }
}

impl<'a> Identified<'a> {
    /// Puts the strings together piece by piece: formatting machinery would be a third of an evaluation.
    fn new(identity: &'a SpiffeId) -> Self {
        let (namespace, account) = (identity.namespace(), identity.service_account());
        Self {
            identity,
            principal: [identity.trust_domain().as_str(), "/ns/", namespace, "/sa/", account].concat(),
            account: [namespace, "/", account].concat(),
        }
    }
}
