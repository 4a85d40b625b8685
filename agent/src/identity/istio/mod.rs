//! Certificates from an authority that speaks Istio's certificate service: `underpass ca`, istiod, istio-csr.
//!
//! The key is made here and never leaves; what is sent is a signing request, the identity it is for, and the token of
//! the agent's `ServiceAccount`. The roots of each answer become those that peers are verified with, so the authority can
//! replace its root under a running mesh.

pub(crate) mod channel;
mod refusal;
mod reply;
#[cfg(test)]
mod tests;
pub mod wire;

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use tokio::{task::spawn_blocking, time::timeout};
use tonic::{Request, metadata::AsciiMetadataValue};
use tracing::warn;
use zeroize::Zeroizing;

use self::{
    channel::Connection,
    wire::{IstioCertificateRequest, Metadata, Value, istio_certificate_service_client::IstioCertificateServiceClient},
};
use super::{IssueError, Issuer, Kept, Recalled, Svid, watch::Watch};
use crate::mesh::{IstioCa, SpiffeId};

/// Name of the field of the request's metadata that says whose certificate is wanted; the caller's own without it.
pub const IMPERSONATED: &str = "ImpersonatedIdentity";
/// Largest answer, bytes.
const MAX_ANSWER: usize = 1024 * 1024;
/// Largest file of roots, bytes.
const MAX_ROOT_FILE: usize = 1024 * 1024;
/// Largest token, bytes: a header of HTTP/2 has to hold it.
const MAX_TOKEN: usize = 12 * 1024;
/// A directory that could not be watched is tried again this often.
const RETRY_WATCH: Duration = Duration::from_secs(10);

/// Asks an authority over gRPC.
pub struct IstioIssuer {
    ca: IstioCa,
    connection: Mutex<Option<Connection>>,
    watch: Watch,
    watched: AtomicBool,
    /// The root file as [`Issuer::changed`] last reported it.
    reported: Mutex<Option<Vec<u8>>>,
    /// Where what was issued is kept for the next agent.
    kept: Option<Kept>,
}

impl IstioIssuer {
    /// Asks `ca`. Neither the authority nor the files need to be there yet.
    pub fn new(ca: IstioCa) -> Result<Self, IssueError> {
        let watch = Watch::new().map_err(|e| IssueError::File {
            action: "watching for changes of",
            path: ca.root_file.display().to_string(),
            reason: format!("{e}; raise fs.inotify.max_user_instances if it is exhausted"),
        })?;
        let reported = Mutex::new(std::fs::read(&ca.root_file).ok());
        let issuer =
            Self { ca, connection: Mutex::default(), watch, watched: AtomicBool::new(false), reported, kept: None };
        issuer.watch_directory(true);
        Ok(issuer)
    }

    /// Keeps what is issued, and recalls what was.
    #[must_use]
    pub fn keeping(mut self, kept: Option<Kept>) -> Self {
        self.kept = kept;
        self
    }

    /// What makes the authority the one that it is: where it is, and the roots in PEM that it is verified with.
    fn authority(&self, roots: &[u8]) -> Vec<u8> {
        [self.ca.address.to_string().as_bytes(), b"\n", roots].concat()
    }

    fn watch_directory(&self, log: bool) -> bool {
        let directory = self.ca.root_file.parent().unwrap_or(Path::new("/")).to_owned();
        let failed = self.watch.set(&BTreeSet::from([directory]));
        for (directory, error) in failed.iter().filter(|_| log) {
            warn!(directory = %directory.display(), %error, "cannot watch the authority's roots for changes; looking every 10 s instead");
        }
        self.watched.store(failed.is_empty(), Relaxed);
        failed.is_empty()
    }

    async fn ask(&self, identity: &SpiffeId) -> Result<Svid, IssueError> {
        let key = KeyPair::generate().map_err(|e| signing(identity, &e))?;
        let csr = request(identity, &key).map_err(|e| signing(identity, &e))?;
        let message = IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.ca.lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Metadata {
                fields: HashMap::from([(IMPERSONATED.to_owned(), Value { string_value: Some(identity.to_string()) })]),
            }),
        };
        let mut message = Request::new(message);
        message.metadata_mut().insert("authorization", self.bearer().await?);
        if !self.ca.cluster_id.is_empty() {
            let id = AsciiMetadataValue::try_from(&self.ca.cluster_id).map_err(|e| signing(identity, &e))?;
            message.metadata_mut().insert("clusterid", id);
        }

        let connection = self.connection().await?;
        let mut client =
            IstioCertificateServiceClient::new(connection.channel.clone()).max_decoding_message_size(MAX_ANSWER);
        let answer = client.create_certificate(message).await.map_err(|status| {
            if refusal::is_transport(&status) {
                self.forget(&connection);
            }
            IssueError::Authority {
                address: self.ca.address.to_string(),
                identity: identity.clone(),
                reason: refusal::explain(&status, &self.ca),
            }
        })?;

        let unusable = |reason: String| IssueError::Authority {
            address: self.ca.address.to_string(),
            identity: identity.clone(),
            reason: format!("its answer cannot be used: {reason}"),
        };
        let (chain, roots) = reply::certificates(&answer.into_inner().cert_chain).map_err(unusable)?;
        let der = Zeroizing::new(key.serialize_der());
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der.to_vec()));
        let svid = Svid::assemble(identity, chain, private, &roots).map_err(unusable)?;
        svid.verify(SystemTime::now()).map_err(unusable)?;
        if let Some(kept) = self.kept.clone() {
            let (identity, authority) = (identity.clone(), self.authority(&connection.roots));
            let chain = Arc::clone(&svid.certified);
            let keep = move || kept.keep(&identity, &authority, &chain.cert, &roots, &der);
            // It says itself what goes wrong.
            let _ = spawn_blocking(keep).await;
        }
        Ok(svid)
    }

    /// The header with the token, read each time: the kubelet replaces it long before it expires.
    async fn bearer(&self) -> Result<AsciiMetadataValue, IssueError> {
        let error = |reason: String| file_error("reading issuer.istio.tokenFile", &self.ca.token_file, reason);
        let token = read(&self.ca.token_file, MAX_TOKEN).await.map_err(error)?;
        let token = std::str::from_utf8(&token).ok().map(str::trim).filter(|t| !t.is_empty());
        let token = token.ok_or_else(|| error("no token in it; mount a projected serviceAccountToken there".into()))?;
        let header = Zeroizing::new(format!("Bearer {token}"));
        let mut header = AsciiMetadataValue::try_from(header.as_str())
            .map_err(|_| error("characters that no token has; mount a projected serviceAccountToken there".into()))?;
        // Neither compressed nor shown.
        header.set_sensitive(true);
        Ok(header)
    }

    /// The connection, a new one when the roots are others than it was made with.
    async fn connection(&self) -> Result<Connection, IssueError> {
        let error = |reason: String| file_error("reading issuer.istio.rootFile", &self.ca.root_file, reason);
        let pem = read(&self.ca.root_file, MAX_ROOT_FILE).await.map_err(error)?;
        let mut current = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = current.as_ref().filter(|c| *c.roots == *pem) {
            return Ok(connection.clone());
        }
        let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let roots = roots.map_err(|e| error(format!("{e}; write it as PEM")))?;
        let connection = Connection::new(&self.ca, &pem, roots).map_err(error)?;
        *current = Some(connection.clone());
        Ok(connection)
    }

    /// The next attempt connects anew, perhaps to another replica.
    fn forget(&self, connection: &Connection) {
        let mut current = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_some_and(|c| c.id == connection.id) {
            *current = None;
        }
    }
}

impl Issuer for IstioIssuer {
    fn lacks(&self) -> Option<String> {
        let file = &self.ca.root_file;
        let there = std::fs::metadata(file).is_ok_and(|meta| meta.len() > 0);
        (!there).then(|| {
            format!(
                "the authority's roots are not in {} yet (a kubelet takes a minute to show what was published)",
                file.display()
            )
        })
    }

    fn name(&self) -> &'static str {
        "istio"
    }

    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Svid, IssueError>> {
        Box::pin(self.ask(identity))
    }

    fn recall(&self, identity: &SpiffeId) -> Option<Recalled> {
        // Without it, what is kept is of no authority that is known, and asked for anew as soon as there is one.
        let roots = std::fs::read(&self.ca.root_file).unwrap_or_default();
        self.kept.as_ref()?.recall(identity, &self.authority(&roots), SystemTime::now())
    }

    fn forget(&self, identity: &SpiffeId) {
        if let Some(kept) = &self.kept {
            kept.forget(identity);
        }
    }

    fn forget_others(&self, wanted: &BTreeSet<SpiffeId>) {
        if let Some(kept) = &self.kept {
            kept.retain(wanted);
        }
    }

    /// Resolves when the root file has other content: the authority may have a new root, or be another one.
    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            loop {
                let before = self.watched.load(Relaxed);
                match (before, self.watch_directory(false)) {
                    // What happened before the watch began is not known.
                    (false, true) => {}
                    (true, true) => self.watch.changed().await,
                    (_, false) => {
                        let _ = timeout(RETRY_WATCH, self.watch.changed()).await;
                    }
                }
                // Without the file the next attempt fails and says so; what was issued stays.
                let Ok(roots) = tokio::fs::read(&self.ca.root_file).await else { continue };
                let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
                if reported.as_ref() != Some(&roots) {
                    *reported = Some(roots);
                    return;
                }
            }
        })
    }
}

/// PKCS #10 in PEM. The name in it is what istiod wants to see; `underpass ca` does not look.
fn request(identity: &SpiffeId, key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.serialize_request(key)?.pem()
}

async fn read(path: &Path, most: usize) -> Result<Zeroizing<Vec<u8>>, String> {
    let missing = |e: std::io::Error| format!("{e}; mount the file or correct its path");
    let length = tokio::fs::metadata(path).await.map_err(missing)?.len();
    if length > most as u64 {
        return Err(format!("{length} bytes, at most {most} are read; correct its path"));
    }
    tokio::fs::read(path).await.map(Zeroizing::new).map_err(missing)
}

fn file_error(action: &'static str, path: &Path, reason: String) -> IssueError {
    IssueError::File { action, path: path.display().to_string(), reason }
}

fn signing(identity: &SpiffeId, reason: &dyn std::fmt::Display) -> IssueError {
    IssueError::Signing { identity: identity.clone(), reason: reason.to_string() }
}
