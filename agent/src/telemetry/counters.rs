//! What the agent counts. Plain atomics: incremented on the data path, read by the admin socket.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use serde::{Deserialize, Serialize};

/// Why a connection was refused or cut. The name (`kebab-case`) is what logs, counters and the CLI show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(usize)]
pub enum RefusalReason {
    /// Somebody dialled the outbound listener directly, or the flow entry was lost.
    NoOriginalDestination,
    /// The pod has no valid certificate of its own (not issued yet, or expired).
    NoCertificate,
    /// The service has no endpoint that can be used.
    NoEndpoint,
    /// It is not known who the endpoints of the service are, or whether the pod at the address is
    /// in the mesh, and that did not become known in time.
    EndpointUnknown,
    /// The destination is in the mesh and cannot be reached through a tunnel. It is never dialled
    /// in plaintext.
    PlaintextToMesh,
    /// TCP connect to the peer or the application failed.
    UpstreamUnreachable,
    /// The TLS handshake failed for another reason than the ones below.
    TlsHandshake,
    /// Certificate signed by no trusted root, or self-signed.
    UntrustedIssuer,
    /// Certificate expired or not yet valid.
    CertificateExpired,
    /// Certificate on a revocation list.
    CertificateRevoked,
    /// The certificate's trust domain is not accepted here.
    WrongTrustDomain,
    /// The peer proved another identity than the one the destination has.
    WrongIdentity,
    /// No certificate, or one without exactly one SPIFFE identity of the accepted form.
    InvalidCertificate,
    /// The peer does not speak `underpass/1`.
    NoAlpn,
    /// Bytes that are not TLS, plaintext included.
    NotTls,
    /// The PROXY header was missing, malformed, too long or late.
    ProxyHeader,
    /// The PROXY header's destination is not this pod, or one of the agent's ports.
    ProxyDestination,
    /// The PROXY header's source is not the tunnel's peer.
    ProxySource,
    /// A handshake or header took longer than its deadline.
    Deadline,
    /// The pod's cap on pending handshakes or connections was reached.
    PodLimit,
    /// The peer refused after our handshake: a late fatal alert.
    DeniedByPeer,
    /// The peer could not reach its application: alert `internal_error`.
    PeerUpstreamUnreachable,
    /// FIN without `close_notify`.
    Truncated,
    /// A record that could not be decrypted or parsed.
    BadRecord,
    /// A policy, or the mode STRICT, forbids it.
    Policy,
    /// The pod vanished from what the agent knows and is kept: captured, and closed.
    KeptPod,
    /// A key has protected as many records as it may, and the kernel cannot replace it.
    KeyLimit,
    /// A destination that is an agent port of a mesh workload.
    AgentPort,
    /// The agent ran out of a resource (descriptors, memory).
    Resources,
}

/// Number of reasons.
const REASONS: usize = RefusalReason::Resources as usize + 1;

impl RefusalReason {
    /// Every reason, in order.
    pub const ALL: [RefusalReason; REASONS] = {
        use RefusalReason::{
            AgentPort, BadRecord, CertificateExpired, CertificateRevoked, Deadline, DeniedByPeer, EndpointUnknown,
            InvalidCertificate, KeptPod, KeyLimit, NoAlpn, NoCertificate, NoEndpoint, NoOriginalDestination, NotTls,
            PeerUpstreamUnreachable, PlaintextToMesh, PodLimit, Policy, ProxyDestination, ProxyHeader, ProxySource,
            Resources, TlsHandshake, Truncated, UntrustedIssuer, UpstreamUnreachable, WrongIdentity, WrongTrustDomain,
        };
        [
            NoOriginalDestination,
            NoCertificate,
            NoEndpoint,
            EndpointUnknown,
            PlaintextToMesh,
            UpstreamUnreachable,
            TlsHandshake,
            UntrustedIssuer,
            CertificateExpired,
            CertificateRevoked,
            WrongTrustDomain,
            WrongIdentity,
            InvalidCertificate,
            NoAlpn,
            NotTls,
            ProxyHeader,
            ProxyDestination,
            ProxySource,
            Deadline,
            PodLimit,
            DeniedByPeer,
            PeerUpstreamUnreachable,
            Truncated,
            BadRecord,
            Policy,
            KeptPod,
            KeyLimit,
            AgentPort,
            Resources,
        ]
    };

    /// The name in logs and counters.
    pub const fn as_str(self) -> &'static str {
        use RefusalReason::{
            AgentPort, BadRecord, CertificateExpired, CertificateRevoked, Deadline, DeniedByPeer, EndpointUnknown,
            InvalidCertificate, KeptPod, KeyLimit, NoAlpn, NoCertificate, NoEndpoint, NoOriginalDestination, NotTls,
            PeerUpstreamUnreachable, PlaintextToMesh, PodLimit, Policy, ProxyDestination, ProxyHeader, ProxySource,
            Resources, TlsHandshake, Truncated, UntrustedIssuer, UpstreamUnreachable, WrongIdentity, WrongTrustDomain,
        };
        match self {
            NoOriginalDestination => "no-original-destination",
            NoCertificate => "no-certificate",
            NoEndpoint => "no-endpoint",
            EndpointUnknown => "endpoint-unknown",
            PlaintextToMesh => "plaintext-to-mesh",
            UpstreamUnreachable => "upstream-unreachable",
            TlsHandshake => "tls-handshake",
            UntrustedIssuer => "untrusted-issuer",
            CertificateExpired => "certificate-expired",
            CertificateRevoked => "certificate-revoked",
            WrongTrustDomain => "wrong-trust-domain",
            WrongIdentity => "wrong-identity",
            InvalidCertificate => "invalid-certificate",
            NoAlpn => "no-alpn",
            NotTls => "not-tls",
            ProxyHeader => "proxy-header",
            ProxyDestination => "proxy-destination",
            ProxySource => "proxy-source",
            Deadline => "deadline",
            PodLimit => "pod-limit",
            DeniedByPeer => "denied-by-peer",
            PeerUpstreamUnreachable => "peer-upstream-unreachable",
            Truncated => "truncated",
            BadRecord => "bad-record",
            Policy => "policy",
            KeptPod => "kept-pod",
            KeyLimit => "key-limit",
            AgentPort => "agent-port",
            Resources => "resources",
        }
    }
}

impl std::fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a tunnel's records are protected in the agent and not in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KtlsFallback {
    /// Kernel TLS was turned off.
    Disabled,
    /// The kernel has none, or its module cannot be loaded.
    Unavailable,
    /// The peers agreed on a cipher that this kernel does not have.
    Cipher,
    /// The kernel refused this one socket.
    Socket,
}

/// Number of fallbacks.
const FALLBACKS: usize = KtlsFallback::Socket as usize + 1;

impl KtlsFallback {
    /// All of them, in order.
    pub const ALL: [Self; FALLBACKS] = [Self::Disabled, Self::Unavailable, Self::Cipher, Self::Socket];

    /// The name in logs and counters.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::Unavailable => "unavailable",
            Self::Cipher => "cipher",
            Self::Socket => "socket",
        }
    }
}

/// The agent's counters.
#[derive(Debug, Default)]
pub struct Counters {
    /// Tunnels whose handshake succeeded, as client.
    pub tunnels_out: AtomicU64,
    /// Tunnels whose handshake succeeded, as server.
    pub tunnels_in: AtomicU64,
    /// Handshakes that resumed a session, either side.
    pub resumed: AtomicU64,
    /// Connections passed through in plaintext because the destination is not in the mesh.
    pub passthrough: AtomicU64,
    /// Inbound plaintext connections that a policy was asked about and let in.
    pub plaintext_in: AtomicU64,
    /// Connections that ended with `close_notify` both ways, or FIN both ways for pass-through.
    pub closed_clean: AtomicU64,
    /// Connections that ended with a reset.
    pub closed_reset: AtomicU64,
    /// Second endpoints tried.
    pub retries: AtomicU64,
    /// Tunnels whose records the kernel protects.
    pub ktls: AtomicU64,
    fallbacks: [AtomicU64; FALLBACKS],
    refused: [AtomicU64; REASONS],
}

/// The counters at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CountersSnapshot {
    /// See [`Counters::tunnels_out`].
    pub tunnels_out: u64,
    /// See [`Counters::tunnels_in`].
    pub tunnels_in: u64,
    /// See [`Counters::resumed`].
    pub resumed: u64,
    /// See [`Counters::passthrough`].
    pub passthrough: u64,
    /// See [`Counters::plaintext_in`].
    #[serde(default)]
    pub plaintext_in: u64,
    /// See [`Counters::closed_clean`].
    pub closed_clean: u64,
    /// See [`Counters::closed_reset`].
    pub closed_reset: u64,
    /// See [`Counters::retries`].
    pub retries: u64,
    /// See [`Counters::ktls`].
    #[serde(default)]
    pub ktls: u64,
    /// Tunnels whose records the agent protects, by the reason why; reasons never seen are left out.
    #[serde(default)]
    pub ktls_fallback: BTreeMap<String, u64>,
    /// By reason; reasons never seen are left out.
    pub refused: BTreeMap<String, u64>,
}

impl Counters {
    /// Counts a refusal.
    pub fn refuse(&self, reason: RefusalReason) {
        self.refused[reason as usize].fetch_add(1, Relaxed);
    }

    /// How often `reason` happened.
    pub fn refused(&self, reason: RefusalReason) -> u64 {
        self.refused[reason as usize].load(Relaxed)
    }

    /// Counts an established tunnel by who protects its records.
    pub fn tunnel(&self, fallback: Option<KtlsFallback>) {
        fallback.map_or(&self.ktls, |why| &self.fallbacks[why as usize]).fetch_add(1, Relaxed);
    }

    /// Tunnels whose records the agent protects for this reason.
    pub fn fallbacks(&self, why: KtlsFallback) -> u64 {
        self.fallbacks[why as usize].load(Relaxed)
    }

    /// All values now.
    pub fn snapshot(&self) -> CountersSnapshot {
        CountersSnapshot {
            tunnels_out: self.tunnels_out.load(Relaxed),
            tunnels_in: self.tunnels_in.load(Relaxed),
            resumed: self.resumed.load(Relaxed),
            passthrough: self.passthrough.load(Relaxed),
            plaintext_in: self.plaintext_in.load(Relaxed),
            closed_clean: self.closed_clean.load(Relaxed),
            closed_reset: self.closed_reset.load(Relaxed),
            retries: self.retries.load(Relaxed),
            ktls: self.ktls.load(Relaxed),
            ktls_fallback: seen(KtlsFallback::ALL.into_iter().map(|f| (f.as_str(), self.fallbacks(f)))),
            refused: seen(RefusalReason::ALL.into_iter().map(|r| (r.as_str(), self.refused(r)))),
        }
    }
}

/// By name, without those that never happened.
fn seen(counts: impl Iterator<Item = (&'static str, u64)>) -> BTreeMap<String, u64> {
    counts.filter(|(_, n)| *n > 0).map(|(name, n)| (name.to_owned(), n)).collect()
}
