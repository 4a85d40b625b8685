//! The file as a source: its first load, and what a changed file may change.

use std::{
    fs::OpenOptions,
    hash::{BuildHasher as _, RandomState},
    io::Read as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::libc;
use tracing::{error, info, warn};

use super::{ConfigError, IssuerConfig, LAST_GOOD, MAX_DOCUMENT, NodeConfig, ReloadStats, parse_for};
use crate::{
    mesh::{Departures, MeshStore, SnapshotBuilder, TrustDomain},
    sources::kubernetes::KubernetesConfig,
    telemetry::logging::printable,
};

/// A configuration file that was loaded once.
#[derive(Debug)]
pub struct FileSource {
    pub(super) path: PathBuf,
    state_dir: PathBuf,
    /// The node's name, if it is not the document's.
    named: Option<String>,
    stats: Arc<ReloadStats>,
    fixed: Fixed,
    hasher: RandomState,
    /// Digest of the content that was judged last, and the verdict on it.
    judged: Judged,
    /// Digest of the content in force.
    in_force: Option<u64>,
}

/// What cannot change while the agent runs: every certificate and listener depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fixed {
    node: Arc<str>,
    trust_domain: TrustDomain,
    issuer: IssuerConfig,
    crl_file: Option<PathBuf>,
    kubernetes: Option<KubernetesConfig>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Judged {
    Content(u64),
    Unreadable(String),
}

impl FileSource {
    /// Loads `path`; when it cannot be read or is invalid, the last good copy in `state_dir`, and says so in the log
    /// and in [`stats`](Self::stats). A valid file becomes the new last good copy.
    /// `node` wins over the name in the document.
    pub fn open(path: &Path, state_dir: &Path, node: Option<&str>) -> Result<(Self, NodeConfig), ConfigError> {
        let hasher = RandomState::new();
        let stats = Arc::new(ReloadStats::default());
        let text = read(path);
        let judged = judged(&hasher, &text);
        let result = text.and_then(|text| Ok((parse_for(&path.display().to_string(), &text, node)?, text)));
        let (config, in_force) = match result {
            Ok((config, text)) => {
                keep(state_dir, &text);
                stats.accepted();
                (config, Some(hasher.hash_one(&text)))
            }
            Err(problem) => {
                stats.rejected(&problem.0);
                let copy = LAST_GOOD.path(state_dir);
                let mut config = LAST_GOOD
                    .read(state_dir)
                    .map_err(|e| e.to_string())
                    .and_then(|text| parse_for(&copy.display().to_string(), &text, node).map_err(|e| e.0))
                    .map_err(|e| {
                        ConfigError(format!("{problem}\nno last good copy to start from: {}: {e}", copy.display()))
                    })?;
                // A copy may be older than a pod: nobody leaves the mesh because of what it says.
                let mut builder = SnapshotBuilder::amend(config.snapshot);
                builder.departures(Departures::default());
                config.snapshot = builder.build();
                stats.started_from_last_good();
                error!(%problem, copy = %copy.display(), "configuration not accepted; started from the last good copy");
                (config, None)
            }
        };
        let fixed = Fixed::of(&config);
        let source = Self {
            path: path.to_owned(),
            state_dir: state_dir.to_owned(),
            named: node.map(ToOwned::to_owned),
            stats,
            fixed,
            hasher,
            judged,
            in_force,
        };
        Ok((source, config))
    }

    /// Counts of what was accepted and refused.
    pub fn stats(&self) -> Arc<ReloadStats> {
        Arc::clone(&self.stats)
    }

    /// Reads the file again and puts it into `store` when it changed and is valid. Blocks on the file system.
    pub(super) fn reload(&mut self, store: &MeshStore) {
        let text = read(&self.path);
        let judged = judged(&self.hasher, &text);
        if judged == self.judged {
            return;
        }
        self.judged = judged;
        let digest = text.as_ref().ok().map(|t| self.hasher.hash_one(t));
        if digest.is_some() && digest == self.in_force {
            info!(path = %self.path.display(), "configuration is again what is in force");
            self.stats.in_force();
            return;
        }
        let name = self.path.display().to_string();
        let accepted = text.and_then(|text| {
            let config = parse_for(&name, &text, self.named.as_deref())?;
            self.fixed.unchanged(&name, &config)?;
            Ok((config, text))
        });
        match accepted {
            Ok((config, text)) => {
                self.in_force = digest;
                // Counted first, so that whoever is woken by the new generation sees it counted.
                self.stats.accepted();
                let snapshot = store.replace(config.snapshot);
                info!(
                    path = %name,
                    generation = snapshot.generation,
                    workloads = snapshot.workloads().count(),
                    services = snapshot.services().len(),
                    policies = snapshot.policies().len(),
                    "configuration in force"
                );
                keep(&self.state_dir, &text);
            }
            Err(problem) => {
                self.stats.rejected(&problem.0);
                error!(%problem, "configuration not accepted; the previous one stays in force");
            }
        }
    }
}

impl Fixed {
    fn of(config: &NodeConfig) -> Self {
        Self {
            node: Arc::clone(&config.snapshot.node),
            trust_domain: config.snapshot.trust_domain.clone(),
            issuer: config.issuer.clone(),
            crl_file: config.crl_file.clone(),
            kubernetes: config.kubernetes.clone(),
        }
    }

    fn unchanged(&self, file: &str, config: &NodeConfig) -> Result<(), ConfigError> {
        let new = Self::of(config);
        let changed = |field: &str, from: &str, to: &str| {
            Err(ConfigError(format!(
                "{file}: {field} changed from {from} to {to}: restart needed; restart the agent, or change it back"
            )))
        };
        if new.node != self.node {
            return changed("node", &self.node, &new.node);
        }
        if new.trust_domain != self.trust_domain {
            return changed("trustDomain", self.trust_domain.as_str(), new.trust_domain.as_str());
        }
        if new.issuer != self.issuer {
            return changed("issuer", &describe(&self.issuer), &describe(&new.issuer));
        }
        if new.crl_file != self.crl_file {
            let describe = |file: &Option<PathBuf>| match file {
                Some(file) => printable(&file.display().to_string()).to_string(),
                None => "nothing".to_owned(),
            };
            return changed("crlFile", &describe(&self.crl_file), &describe(&new.crl_file));
        }
        if new.kubernetes != self.kubernetes {
            let describe = |k: &Option<KubernetesConfig>| match k {
                Some(k) => format!("{:?} with clusterDomain {}", k.kubeconfig, k.cluster_domain),
                None => "nothing".to_owned(),
            };
            return changed("kubernetes", &describe(&self.kubernetes), &describe(&new.kubernetes));
        }
        Ok(())
    }
}

fn describe(issuer: &IssuerConfig) -> String {
    match issuer {
        IssuerConfig::Local { ca_dir, lifetime } => {
            let dir = ca_dir.display().to_string();
            format!("local (caDir {}, lifetime {})", printable(&dir), humantime::format_duration(*lifetime))
        }
        IssuerConfig::Files => "files".to_owned(),
        IssuerConfig::Istio(ca) => {
            let files = format!("rootFile {}, tokenFile {}", ca.root_file.display(), ca.token_file.display());
            let lifetime = humantime::format_duration(ca.lifetime);
            let name = ca.server_name.as_deref().map(|n| format!(", serverName {n}")).unwrap_or_default();
            let cluster = &ca.cluster_id;
            format!(
                "istio (address {}, {}, clusterId {cluster}, lifetime {lifetime}{name})",
                ca.address,
                printable(&files)
            )
        }
    }
}

fn judged(hasher: &RandomState, text: &Result<String, ConfigError>) -> Judged {
    match text {
        Ok(text) => Judged::Content(hasher.hash_one(text)),
        Err(e) => Judged::Unreadable(e.0.clone()),
    }
}

/// Keeping the copy is a convenience for the next start: failing to must not stop this one.
fn keep(state_dir: &Path, text: &str) {
    if let Err(reason) = LAST_GOOD.save(state_dir, text) {
        warn!(
            copy = %LAST_GOOD.path(state_dir).display(),
            %reason,
            "the last good copy could not be written; the configuration is in force, but a start without it would use an older copy or fail"
        );
    }
}

pub(super) fn read(path: &Path) -> Result<String, ConfigError> {
    let name = path.display();
    let failed =
        |e: std::io::Error| ConfigError(format!("reading {name}: {e}; check --config and the file's permissions"));
    // Non-blocking, so that a FIFO or a device does not hang the agent before it can be refused.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ConfigError(format!("reading {name}: not a regular file; name a YAML file with --config")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_DOCUMENT as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        ConfigError(format!("{name}: byte {at} is not UTF-8; save the file as UTF-8"))
    })
}
