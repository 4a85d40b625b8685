//! Istio's certificate service: who asks, whether they may have what they ask for, and the line about it in the log.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};
use tracing::{info, warn};

use super::{
    csr,
    limits::Limits,
    metrics::{Metrics, Reason},
    pods::{Found, Pods, PodsError, Unsigned},
    review::{Agent, ReviewError, Reviewer},
    server::Peer,
    signer::{Current, Signed},
};
use crate::{
    identity::{
        authority::MIN_LIFETIME,
        istio::{
            IMPERSONATED,
            wire::{
                IstioCertificateRequest, IstioCertificateResponse, Metadata,
                istio_certificate_service_server::IstioCertificateService,
            },
        },
    },
    mesh::{IdentityError, SpiffeId, TrustDomain},
};

/// Target of the audit's lines, so that they can be filtered and kept apart.
pub const AUDIT: &str = "underpass::audit";

/// The service.
pub(super) struct Service {
    pub(super) trust_domain: TrustDomain,
    pub(super) lifetime: Duration,
    pub(super) signer: watch::Receiver<Current>,
    pub(super) reviewer: Arc<Reviewer>,
    pub(super) pods: Arc<Pods>,
    pub(super) limits: Arc<Limits>,
    pub(super) metrics: Arc<Metrics>,
}

/// Why nothing was signed. What is said reaches whoever asked.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("too many requests at once; try again")]
    Busy,
    #[error("too many requests from this address; try again")]
    AddressRate,
    #[error("too many requests for node {0}; try again")]
    NodeRate(String),
    #[error(transparent)]
    Review(#[from] ReviewError),
    #[error("{0}")]
    Identity(String),
    #[error("identities of trust domain {0} are signed here")]
    TrustDomain(TrustDomain),
    #[error("no pod with {identity} runs on node {node}")]
    NotOnNode { identity: SpiffeId, node: String },
    #[error("nothing is signed for the pod with {identity} on node {node}: {why}")]
    Unsigned { identity: SpiffeId, node: String, why: Unsigned },
    #[error(transparent)]
    Pods(#[from] PodsError),
    #[error("{0}")]
    Csr(String),
    #[error("there is no signing key yet; try again")]
    NoSigner,
    #[error("signing failed: {0}")]
    Signing(String),
}

impl Refusal {
    fn label(&self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::AddressRate => "address-rate",
            Self::NodeRate(_) => "node-rate",
            Self::Review(review) => review.label(),
            Self::Identity(_) => "bad-identity",
            Self::TrustDomain(_) => "wrong-trust-domain",
            Self::NotOnNode { .. } => "not-on-node",
            Self::Unsigned { why, .. } => why.label(),
            Self::Pods(PodsError::Busy) => "pods-rate",
            Self::Pods(PodsError::Api) => "api-unavailable",
            Self::Csr(_) => "bad-request",
            Self::NoSigner => "no-signer",
            Self::Signing(_) => "signing",
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Busy | Self::AddressRate | Self::NodeRate(_) | Self::Pods(PodsError::Busy) => Code::ResourceExhausted,
            Self::Review(review) => review.code(),
            Self::Identity(_) | Self::Csr(_) => Code::InvalidArgument,
            Self::TrustDomain(_) | Self::NotOnNode { .. } | Self::Unsigned { .. } => Code::PermissionDenied,
            Self::Pods(PodsError::Api) | Self::NoSigner => Code::Unavailable,
            Self::Signing(_) => Code::Internal,
        }
    }
}

/// What is known about a request so far, for its line in the log.
#[derive(Default)]
struct Asked {
    agent: Option<Arc<Agent>>,
    identity: Option<SpiffeId>,
}

impl Service {
    async fn answer(
        &self,
        peer: Option<&Peer>,
        request: Request<IstioCertificateRequest>,
        asked: &mut Asked,
    ) -> Result<Signed, Refusal> {
        let peer = peer.ok_or(Refusal::AddressRate)?;
        let _serving = peer.place.serving();
        let stranger = self.limits.stranger(peer.address.ip()).ok_or(Refusal::Busy)?;
        if !self.limits.address(peer.address.ip()) {
            return Err(Refusal::AddressRate);
        }
        let agent = self.reviewer.agent(bearer(&request)?).await?;
        asked.agent = Some(Arc::clone(&agent));
        peer.place.authenticated();
        let _place = self.limits.agent(&agent.node).ok_or(Refusal::Busy)?;
        drop(stranger);
        if !self.limits.node(&agent.node) {
            return Err(Refusal::NodeRate(agent.node.clone()));
        }

        let request = request.into_inner();
        let identity = self.identity(request.metadata.as_ref(), &agent)?;
        asked.identity = Some(identity.clone());
        // The review has found the agent's own pod, which has hostNetwork.
        let own = (identity.namespace(), identity.service_account()) == (&agent.namespace, &agent.service_account);
        if !own {
            let node = agent.node.clone();
            match self.pods.runs(&node, identity.namespace(), identity.service_account()).await? {
                Found::Running => {}
                Found::Unsigned(why) => return Err(Refusal::Unsigned { identity, node, why }),
                Found::Nowhere => return Err(Refusal::NotOnNode { identity, node }),
            }
        }

        let key = csr::public_key(&request.csr).map_err(Refusal::Csr)?;
        let signer = self.signer.borrow().clone().ok_or(Refusal::NoSigner)?;
        let lifetime = lifetime(request.validity_duration, self.lifetime);
        // RSA takes milliseconds.
        let signed =
            tokio::task::spawn_blocking(move || signer.sign(&identity, &key, lifetime, SystemTime::now())).await;
        signed.map_err(|e| Refusal::Signing(e.to_string()))?.map_err(Refusal::Signing)
    }

    /// Whose certificate: the impersonated identity, or the caller's own.
    fn identity(&self, metadata: Option<&Metadata>, agent: &Agent) -> Result<SpiffeId, Refusal> {
        let own = || SpiffeId::new(self.trust_domain.clone(), &agent.namespace, &agent.service_account);
        let identity = impersonated(metadata).map_err(Refusal::Identity)?;
        let identity =
            identity.map_or_else(own, str::parse).map_err(|e: IdentityError| Refusal::Identity(e.to_string()))?;
        if *identity.trust_domain() == self.trust_domain {
            Ok(identity)
        } else {
            Err(Refusal::TrustDomain(self.trust_domain.clone()))
        }
    }

    fn audit(&self, peer: Option<IpAddr>, asked: &Asked, outcome: &Result<Signed, Refusal>) {
        let agent = asked.agent.as_ref();
        let pod = agent.map(|a| format!("{}/{}", a.namespace, a.pod));
        let (node, pod) = (agent.map(|a| a.node.as_str()), pod.as_deref());
        let identity = asked.identity.as_ref().map(tracing::field::display);
        let peer = peer.map(tracing::field::display);
        match outcome {
            Ok(signed) => {
                self.metrics.signed.inc();
                let until = humantime::format_rfc3339_seconds(signed.not_after);
                info!(target: AUDIT, node, pod, identity, serial = signed.serial, %until, peer, "signed");
            }
            Err(refusal) => {
                let reason = refusal.label();
                self.metrics.refused.get_or_create(&Reason { reason }).inc();
                // A flood of refusals must not push the lines about signatures out of the log's queue.
                if self.limits.log() {
                    warn!(target: AUDIT, node, pod, identity, reason, error = %refusal, peer, "refused");
                } else {
                    self.metrics.unlogged.inc();
                }
            }
        }
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let peer = request.extensions().get::<Peer>().cloned();
        let mut asked = Asked::default();
        let outcome = self.answer(peer.as_ref(), request, &mut asked).await;
        self.audit(peer.map(|peer| peer.address.ip().to_canonical()), &asked, &outcome);
        match outcome {
            Ok(signed) => Ok(Response::new(IstioCertificateResponse { cert_chain: signed.chain })),
            Err(refusal) => Err(Status::new(refusal.code(), refusal.to_string())),
        }
    }
}

/// The identity in a request's metadata, if it names one. One that is there but is no text is refused, not taken for absent.
pub fn impersonated(metadata: Option<&Metadata>) -> Result<Option<&str>, String> {
    let Some(value) = metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED)) else { return Ok(None) };
    match value.string_value.as_deref() {
        Some(text) => Ok(Some(text)),
        None => Err(format!("{IMPERSONATED} must be a string")),
    }
}

fn bearer<T>(request: &Request<T>) -> Result<&str, ReviewError> {
    let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
    let (scheme, token) = header.and_then(|h| h.split_once(' ')).ok_or(ReviewError::NoToken)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim()) } else { Err(ReviewError::NoToken) }
}

/// What was asked for, but never more than `most`; nothing asked for is `most`.
fn lifetime(seconds: i64, most: Duration) -> Duration {
    match u64::try_from(seconds) {
        Ok(seconds @ 1..) => Duration::from_secs(seconds).clamp(MIN_LIFETIME, most),
        _ => most,
    }
}
