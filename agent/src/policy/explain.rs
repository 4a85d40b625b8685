//! What would become of a connection, and why: the long form of an evaluation.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{
    Considered, Explanation, Explanations, Opinion, PolicySet, Request, matching, plaintext::is_excluded,
    request::Subject, select,
};
use crate::mesh::{
    Condition, EffectiveMode, InboundMode, Policy, PolicyStatus, Protocol, Resolution, Rule, Service, Snapshot,
    SpiffeId, Workload,
};

/// Endpoints of a service that are explained.
pub const MAX_ENDPOINTS: usize = 16;
/// Rules of a policy of which it is said why they do not match.
const MAX_RULES: usize = 3;

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A mesh peer that proves this identity.
    Mesh {
        /// The identity.
        identity: SpiffeId,
        /// Its address. Without one, that of a workload with this identity is taken.
        source: Option<IpAddr>,
    },
    /// Plaintext from this address.
    Plaintext(IpAddr),
}

/// A connection to explain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// Who connects.
    pub peer: Peer,
    /// Address of a workload or of a service, and port.
    pub to: SocketAddr,
}

/// Why a connection cannot be explained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// Nothing has the address.
    #[error("{0} is the address of no workload and no service; give one of those, as in `workloads` and `services`")]
    Destination(IpAddr),
    /// The service does not have the port.
    #[error("service {service} has no port {port}; give one of its ports")]
    ServicePort {
        /// `namespace/name`.
        service: String,
        /// The port asked for.
        port: u16,
    },
    /// A pod that is in the mesh, or may be, and is no workload.
    #[error(
        "{0} is the address of Pod {1}, which cannot be reached; every connection to it is refused, and `underpass status` says why"
    )]
    Held(IpAddr, String),
    /// Nothing is behind the service.
    #[error("service {0} has no endpoint with an address, so every connection to it is refused")]
    NoEndpoint(String),
    /// Policies look at the source address, and none is known.
    #[error(
        "policies of {workload} look at the peer's address, and no workload with an address has the identity {identity}; give the address with --source-ip"
    )]
    Source {
        /// The destination.
        workload: String,
        /// Who connects.
        identity: String,
    },
}

/// Explains what becomes of a connection to each workload that `query.to` stands for.
pub fn explain(snapshot: &Snapshot, query: &Query) -> Result<Explanations, QueryError> {
    let to = query.to.ip().to_canonical();
    match snapshot.resolve(to) {
        Resolution::Workload(workload) => {
            let explanation = of_workload(snapshot, query, &workload, SocketAddr::new(to, query.to.port()))?;
            Ok(Explanations { service: None, explanations: vec![explanation], endpoints_left_out: 0 })
        }
        Resolution::Service(service) => of_service(snapshot, query, &service),
        Resolution::Held(held) => Err(QueryError::Held(to, held.pod.to_string())),
        Resolution::Unknown => Err(QueryError::Destination(to)),
    }
}

fn of_service(snapshot: &Snapshot, query: &Query, service: &Service) -> Result<Explanations, QueryError> {
    let (dialled, port) = (query.to.ip().to_canonical(), query.to.port());
    let name = || format!("{}/{}", service.namespace, service.name);
    if !service.ports.iter().any(|p| p.port == port) {
        return Err(QueryError::ServicePort { service: name(), port });
    }
    let mut endpoints: Vec<(&Workload, SocketAddr)> = Vec::new();
    for endpoint in &service.endpoints {
        let addresses = &endpoint.workload.addresses;
        let address = addresses.iter().find(|a| a.is_ipv4() == dialled.is_ipv4()).or_else(|| addresses.first());
        if let (Some(address), Some(port)) = (address, service.target_port(endpoint, port)) {
            endpoints.push((&endpoint.workload, SocketAddr::new(*address, port)));
        }
    }
    if endpoints.is_empty() {
        return Err(QueryError::NoEndpoint(name()));
    }
    let explained = endpoints.iter().take(MAX_ENDPOINTS).map(|(w, to)| of_workload(snapshot, query, w, *to));
    Ok(Explanations {
        service: Some(service.hostname.to_string()),
        explanations: explained.collect::<Result<_, _>>()?,
        endpoints_left_out: endpoints.len().saturating_sub(MAX_ENDPOINTS),
    })
}

fn of_workload(
    snapshot: &Snapshot,
    query: &Query,
    workload: &Workload,
    to: SocketAddr,
) -> Result<Explanation, QueryError> {
    let policies = PolicySet::new(select(snapshot, &workload.key));
    let (identity, (source, source_of)) = match &query.peer {
        Peer::Plaintext(source) => (None, (*source, None)),
        Peer::Mesh { identity, source: Some(source) } => (Some(identity), (*source, None)),
        Peer::Mesh { identity, source: None } => {
            (Some(identity), assumed_source(snapshot, identity, workload, to, &policies)?)
        }
    };
    let request = Request { peer: identity, source, destination: to };
    let verdict = policies.evaluate(&request);
    let policy = Opinion::from(&verdict.decision);
    let mode = snapshot.effective_mode(workload, to.port());
    let outside = beside_policy(snapshot, workload, to.port(), mode, identity);
    let (allowed, reason, decided_by) = match outside {
        Some((allowed, reason)) => (allowed, reason, None),
        None => (policy.allowed, policy.reason.clone(), policy.decided_by.clone()),
    };
    Ok(Explanation {
        from: identity.map(ToString::to_string),
        source: source.to_canonical(),
        source_of,
        to,
        workload: workload.key.to_string(),
        node: workload.node.to_string(),
        allowed,
        reason,
        decided_by,
        mode,
        dry_run: verdict.dry_run.as_ref().map(Opinion::from),
        considered: considered(&policies, &Subject::new(&request)),
        policy,
    })
}

/// What decides before policies are asked.
fn beside_policy(
    snapshot: &Snapshot,
    workload: &Workload,
    port: u16,
    mode: EffectiveMode,
    identity: Option<&SpiffeId>,
) -> Option<(bool, String)> {
    if workload.protocol == Protocol::Plain {
        let reason = format!("{} is not in the mesh (protocol: plain), so nothing decides there", workload.key);
        return Some((true, reason));
    }
    if let Some(identity) = identity {
        let (theirs, ours) = (identity.trust_domain(), &snapshot.trust_domain);
        let refusal = || format!("the handshake refuses trust domain {theirs}: only {ours} is accepted");
        return (theirs != ours).then(|| (false, refusal()));
    }
    if is_excluded(snapshot, workload, port) {
        return Some((true, format!("port {port} is excluded (inboundPorts): its plaintext is let in unseen")));
    }
    (mode.mode == InboundMode::Strict)
        .then(|| (false, format!("mode strict (set for the {}) refuses plaintext", mode.set_by)))
}

/// The address of a workload with this identity, of the destination's family if there is one.
fn assumed_source(
    snapshot: &Snapshot,
    identity: &SpiffeId,
    workload: &Workload,
    to: SocketAddr,
    policies: &PolicySet,
) -> Result<(IpAddr, Option<String>), QueryError> {
    let peers = snapshot.workloads().filter(|w| w.identity == *identity);
    let addresses = peers.flat_map(|w| w.addresses.iter().map(move |a| (a.is_ipv4() != to.is_ipv4(), &w.key, *a)));
    if let Some((_, key, address)) = addresses.min() {
        return Ok((address, Some(key.to_string())));
    }
    if policies.selection().policies.iter().flat_map(|p| &p.rules).any(looks_at_source) {
        return Err(QueryError::Source { workload: workload.key.to_string(), identity: identity.to_string() });
    }
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    Ok((any, None))
}

fn looks_at_source(rule: &Rule) -> bool {
    rule.from.iter().any(|s| !s.ip_blocks.is_unset())
        || rule.when.iter().any(|c| matches!(c, Condition::SourceIp(v) if !v.is_unset()))
}

fn considered(policies: &PolicySet, subject: &Subject<'_>) -> Vec<Considered> {
    let selection = policies.selection();
    let unknown = selection.unknown.iter().map(|key| Considered {
        policy: key.to_string(),
        scope: None,
        action: None,
        dry_run: false,
        matches: true,
        rule: None,
        because: "it is not known, so it denies".to_owned(),
    });
    let known = selection.policies.iter().map(|policy| {
        let (matches, rule, because) = literally(policy, subject);
        Considered {
            policy: policy.key.to_string(),
            scope: Some(policy.reach().to_owned()),
            action: Some(policy.action),
            dry_run: policy.dry_run,
            matches,
            rule,
            because,
        }
    });
    unknown.chain(known).collect()
}

/// Does a policy match, with which rule, and why?
fn literally(policy: &Policy, subject: &Subject<'_>) -> (bool, Option<usize>, String) {
    if let PolicyStatus::Invalid { reason } = policy.status() {
        return (true, None, format!("it cannot be evaluated, so it denies: {reason}"));
    }
    if policy.rules.is_empty() {
        return (false, None, "it has no rules, so it matches nothing".to_owned());
    }
    let mut why_not = Vec::new();
    for (i, rule) in policy.rules.iter().enumerate() {
        match matching::outcome(policy, rule, subject) {
            Ok(because) => return (true, Some(i), format!("rules[{i}]: {because}")),
            Err(because) if i < MAX_RULES => why_not.push(format!("rules[{i}]: {because}")),
            Err(_) => {}
        }
    }
    if policy.rules.len() > MAX_RULES {
        why_not.push(format!("and {} more rules", policy.rules.len() - MAX_RULES));
    }
    (false, None, why_not.join("; "))
}
