//! SPIFFE verification of both sides: webpki checks the chain, this module who it is.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use super::TunnelError;
use crate::{
    identity::{Leaf, revocation::Chain},
    mesh::{SpiffeId, TrustDomain},
    telemetry::RefusalReason,
};

/// A certificate that is genuine but not that of somebody we talk to. Travels through rustls as the cause of an
/// [`Error::InvalidCertificate`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum IdentityRefusal {
    #[error("certificate has no usable SPIFFE identity: {0}")]
    Invalid(String),
    #[error("peer is {peer}, of trust domain {} instead of {accepted}", peer.trust_domain())]
    TrustDomain { peer: SpiffeId, accepted: TrustDomain },
    #[error("peer is {peer}, expected {expected}")]
    Identity { peer: SpiffeId, expected: SpiffeId },
    #[error("certificate of {peer} is not valid now")]
    NotValidNow { peer: SpiffeId },
    #[error("certificate of {peer}, or of an authority between it and the root, is revoked")]
    Revoked { peer: SpiffeId },
}

impl IdentityRefusal {
    pub(super) fn reason(&self) -> RefusalReason {
        match self {
            Self::Invalid(_) => RefusalReason::InvalidCertificate,
            Self::TrustDomain { .. } => RefusalReason::WrongTrustDomain,
            Self::Identity { .. } => RefusalReason::WrongIdentity,
            Self::NotValidNow { .. } => RefusalReason::CertificateExpired,
            Self::Revoked { .. } => RefusalReason::CertificateRevoked,
        }
    }
}

impl From<IdentityRefusal> for Error {
    fn from(refusal: IdentityRefusal) -> Self {
        Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
    }
}

/// Whom one side accepts.
#[derive(Debug, Clone)]
pub(super) enum Accepted {
    /// A client dials exactly one identity.
    Exactly(SpiffeId),
    /// A server accepts its trust domain; policy comes later.
    Domain(TrustDomain),
}

impl Accepted {
    /// Checks the leaf's identity.
    pub(super) fn check(&self, leaf: &CertificateDer<'_>) -> Result<Leaf, IdentityRefusal> {
        self.check_parsed(Leaf::parse(leaf).map_err(IdentityRefusal::Invalid)?)
    }

    /// Checks the identity of a leaf that has been parsed.
    pub(super) fn check_parsed(&self, leaf: Leaf) -> Result<Leaf, IdentityRefusal> {
        let peer = &leaf.identity;
        let domain = match self {
            Self::Exactly(id) => id.trust_domain(),
            Self::Domain(domain) => domain,
        };
        if peer.trust_domain() != domain {
            return Err(IdentityRefusal::TrustDomain { peer: peer.clone(), accepted: domain.clone() });
        }
        match self {
            Self::Exactly(expected) if expected != peer => {
                Err(IdentityRefusal::Identity { peer: peer.clone(), expected: expected.clone() })
            }
            _ => Ok(leaf),
        }
    }
}

/// What a peer has shown, read.
#[derive(Clone)]
pub(super) struct Shown {
    pub(super) leaf: Leaf,
    /// Every certificate, for as long as the connection lives.
    pub(super) chain: Arc<Chain>,
}

/// A leaf, and what came with it: the same leaf may come with others.
struct Parsed {
    intermediates: Box<[CertificateDer<'static>]>,
    shown: Shown,
}

/// Certificates parsed before: a resumed session brings the same each time.
#[derive(Default)]
pub(super) struct Leaves {
    parsed: Mutex<HashMap<Box<[u8]>, Parsed>>,
}

impl Leaves {
    /// Leaves kept, some 2 KiB each; more than the pods that talk to one node at a time.
    const MOST: usize = 1024;

    /// [`Leaf::parse`] and [`Chain::of`], once for each chain.
    pub(super) fn parse(&self, certificates: &[CertificateDer<'_>]) -> Result<Shown, IdentityRefusal> {
        let Some((der, intermediates)) = certificates.split_first() else {
            return Err(IdentityRefusal::Invalid("none was presented".into()));
        };
        let mut parsed = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = parsed.get(der.as_ref()).filter(|known| *known.intermediates == *intermediates) {
            return Ok(known.shown.clone());
        }
        let leaf = Leaf::parse(der).map_err(IdentityRefusal::Invalid)?;
        let chain = Arc::new(Chain::of(certificates).map_err(IdentityRefusal::Invalid)?);
        if parsed.len() >= Self::MOST {
            parsed.clear();
        }
        let intermediates = intermediates.iter().map(|der| der.clone().into_owned()).collect();
        let shown = Shown { leaf, chain };
        parsed.insert(der.as_ref().into(), Parsed { intermediates, shown: shown.clone() });
        Ok(shown)
    }
}

/// Verifies the server a client dials.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) accepted: Accepted,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, self.algorithms.all)?;
        self.accepted.check(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies a server's clients.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    accepted: Accepted,
}

impl ClientVerifier {
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        accepted: Accepted,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider)
            // Clients have one certificate; names of CAs would only lengthen the handshake.
            .clear_root_hint_subjects()
            .build()
            .map_err(|e| Error::General(e.to_string()))?;
        Ok(Self { chain, accepted })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        self.accepted.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// What a failed handshake is counted as.
pub(super) fn refusal(error: &Error) -> TunnelError {
    use RefusalReason as R;
    let reason = match error {
        Error::InvalidCertificate(e) => match e {
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => R::CertificateExpired,
            // A bad signature is a certificate that only carries a trusted root's name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => R::UntrustedIssuer,
            CertificateError::Other(OtherError(cause)) => {
                if let Some(refusal) = cause.downcast_ref::<IdentityRefusal>() {
                    return TunnelError::Refused { reason: refusal.reason(), detail: refusal.to_string() };
                }
                R::InvalidCertificate
            }
            _ => R::InvalidCertificate,
        },
        Error::NoCertificatesPresented | Error::UnsupportedNameType => R::InvalidCertificate,
        Error::NoApplicationProtocol => R::NoAlpn,
        Error::AlertReceived(alert) => {
            return TunnelError::Refused {
                reason: super::alert::reason(*alert),
                detail: format!("peer refused the handshake with alert {alert:?}"),
            };
        }
        _ => R::TlsHandshake,
    };
    TunnelError::Refused { reason, detail: error.to_string() }
}
