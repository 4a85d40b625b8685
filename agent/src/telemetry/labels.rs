//! What connections are counted under: the labels of Istio's standard TCP metrics, so that existing dashboards and alerts work.

use std::{
    fmt::{self, Write as _},
    sync::Arc,
};

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, EncodeLabelValue, LabelSetEncoder, LabelValueEncoder};

use super::{RefusalReason, logging::printable};
use crate::mesh::SpiffeId;

/// Longest label value, in bytes: what Kubernetes and DNS allow a name (RFC 1123). Identities are longer than one name.
pub const MAX_VALUE: usize = 253;
/// How Istio writes what is not known.
const UNKNOWN: &str = "unknown";
/// What connections beyond the limit of series are counted under.
const OTHER: &str = "other";

/// Which end of the connection this agent is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's.
    Source,
    /// The server's.
    Destination,
}

impl Reporter {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Source, Self::Destination];

    /// As in the label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// How a connection failed, as short as in access logs and `response_flags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum ResponseFlag {
    /// It did not.
    None,
    /// A policy or the mode forbade it, here or at the peer.
    Deny,
    /// The upstream could not be reached.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// The pod has no certificate, or the peer is somebody else.
    IdentityError,
    /// What came through the tunnel was malformed, forged or cut short.
    Protocol,
    /// A deadline passed.
    Timeout,
    /// A limit was reached: connections of a pod, descriptors, uses of a key.
    Limit,
}

/// Number of flags.
pub const FLAGS: usize = ResponseFlag::Limit as usize + 1;

impl ResponseFlag {
    /// All of them, in order.
    pub const ALL: [Self; FLAGS] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::IdentityError,
        Self::Protocol,
        Self::Timeout,
        Self::Limit,
    ];

    /// As in the label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::Protocol => "PROTOCOL",
            Self::Timeout => "TIMEOUT",
            Self::Limit => "LIMIT",
        }
    }
}

impl From<RefusalReason> for ResponseFlag {
    fn from(reason: RefusalReason) -> Self {
        use RefusalReason as R;
        match reason {
            R::Policy | R::KeptPod | R::DeniedByPeer => Self::Deny,
            R::NoEndpoint
            | R::EndpointUnknown
            | R::PlaintextToMesh
            | R::UpstreamUnreachable
            | R::PeerUpstreamUnreachable => Self::Connect,
            R::TlsHandshake
            | R::UntrustedIssuer
            | R::CertificateExpired
            | R::CertificateRevoked
            | R::WrongTrustDomain
            | R::InvalidCertificate
            | R::NoAlpn
            | R::NotTls => Self::TlsFailure,
            R::NoCertificate | R::WrongIdentity => Self::IdentityError,
            R::NoOriginalDestination
            | R::ProxyHeader
            | R::ProxyDestination
            | R::ProxySource
            | R::Truncated
            | R::BadRecord
            | R::AgentPort => Self::Protocol,
            R::Deadline => Self::Timeout,
            R::PodLimit | R::KeyLimit | R::Resources => Self::Limit,
        }
    }
}

/// One end of a connection, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Party {
    /// Workload.
    pub workload: Option<Arc<str>>,
    /// Its namespace.
    pub namespace: Option<Arc<str>>,
    /// Who it proved to be; only with mutual TLS.
    pub principal: Option<SpiffeId>,
    /// Istio's canonical service: the application's name.
    pub app: Option<Arc<str>>,
    /// Istio's canonical revision: the application's version.
    pub version: Option<Arc<str>>,
}

/// The service that was dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceName {
    /// Host name.
    pub hostname: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
}

/// What connections are counted under, and what the access log says about their ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Labels {
    /// Whose view it is.
    pub reporter: Reporter,
    /// The client.
    pub source: Party,
    /// The server.
    pub destination: Party,
    /// The service, when one was dialled.
    pub service: Option<ServiceName>,
    /// Whether both ends proved who they are.
    pub mutual_tls: bool,
    /// Stands for what the limit of series left no room for.
    pub(super) other: bool,
}

impl Labels {
    /// Labels of one view; everything else unknown.
    pub fn new(reporter: Reporter) -> Self {
        Self {
            reporter,
            source: Party::default(),
            destination: Party::default(),
            service: None,
            mutual_tls: false,
            other: false,
        }
    }

    /// What the connections that the limit leaves no series for are counted under.
    pub(super) fn other(reporter: Reporter) -> Self {
        Self { other: true, ..Self::new(reporter) }
    }
}

/// [`Labels`] as they are exposed, with `response_flags`.
pub struct Exposed<'a> {
    /// The labels.
    pub labels: &'a Labels,
    /// How the connections ended.
    pub flag: ResponseFlag,
}

/// A label's value: made printable, never too long.
enum Value<'a> {
    Known(&'a str),
    Identity(&'a SpiffeId),
    Unknown,
}

impl<'a> From<Option<&'a Arc<str>>> for Value<'a> {
    fn from(name: Option<&'a Arc<str>>) -> Self {
        name.map_or(Self::Unknown, |name| Self::Known(name))
    }
}

fn principal(party: &Party) -> Value<'_> {
    party.principal.as_ref().map_or(Value::Unknown, Value::Identity)
}

impl EncodeLabelValue for Value<'_> {
    fn encode(&self, to: &mut LabelValueEncoder<'_>) -> fmt::Result {
        match self {
            Self::Known(value) => to.write_str(&printable(shortened(value, MAX_VALUE))),
            // Identities are checked, characters and lengths, where they enter the agent.
            Self::Identity(identity) => write!(to, "{identity}"),
            Self::Unknown => to.write_str(UNKNOWN),
        }
    }
}

impl EncodeLabelSet for Exposed<'_> {
    fn encode(&self, to: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let Labels { reporter, source, destination, service, mutual_tls, other } = self.labels;
        let mut label = |name: &str, value: Value<'_>| {
            let value = if *other { Value::Known(OTHER) } else { value };
            (name, value).encode(to.encode_label())
        };
        let name = Value::from;
        label("source_workload", name(source.workload.as_ref()))?;
        label("source_canonical_service", name(source.app.as_ref()))?;
        label("source_canonical_revision", name(source.version.as_ref()))?;
        label("source_workload_namespace", name(source.namespace.as_ref()))?;
        label("source_principal", principal(source))?;
        label("source_app", name(source.app.as_ref()))?;
        label("source_version", name(source.version.as_ref()))?;
        label("source_cluster", Value::Unknown)?;
        label("destination_service", name(service.as_ref().map(|s| &s.hostname)))?;
        label("destination_service_namespace", name(service.as_ref().map(|s| &s.namespace)))?;
        label("destination_service_name", name(service.as_ref().map(|s| &s.name)))?;
        label("destination_workload", name(destination.workload.as_ref()))?;
        label("destination_canonical_service", name(destination.app.as_ref()))?;
        label("destination_canonical_revision", name(destination.version.as_ref()))?;
        label("destination_workload_namespace", name(destination.namespace.as_ref()))?;
        label("destination_principal", principal(destination))?;
        label("destination_app", name(destination.app.as_ref()))?;
        label("destination_version", name(destination.version.as_ref()))?;
        label("destination_cluster", Value::Unknown)?;
        label("connection_security_policy", if *mutual_tls { Value::Known("mutual_tls") } else { Value::Unknown })?;
        // These three keep their values in the series of the rest: dashboards select by them.
        ("reporter", reporter.as_str()).encode(to.encode_label())?;
        ("request_protocol", "tcp").encode(to.encode_label())?;
        ("response_flags", self.flag.as_str()).encode(to.encode_label())
    }
}

/// `text`, or as much of it as fits into `bytes`.
pub fn shortened(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}
