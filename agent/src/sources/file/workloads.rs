//! `workloads` of the document.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use serde_saphyr::{Location, Spanned};

use super::{
    ConfigError, IssuerConfig,
    fields::{Check, mode},
    labels::labels,
    schema::{self, Enroll, Mode},
};
use crate::mesh::{
    BuildError, CertificateFiles, Departures, EffectiveMode, InboundMode, LocalPod, ModeDefaults, ModeSource,
    PodNamespace, PortMode, Protocol, SnapshotBuilder, SpiffeId, TrustDomain, Workload, WorkloadKey, WorkloadPolicy,
};

/// Service account of a workload that names none, as in Kubernetes.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// Adds workloads one by one and remembers what later entries are checked against.
pub(super) struct Workloads<'a> {
    check: Check<'a>,
    node: &'a str,
    trust_domain: &'a TrustDomain,
    issuer: &'a IssuerConfig,
    modes: ModeDefaults,
    known: HashMap<WorkloadKey, Arc<Workload>>,
    namespaces: HashMap<PathBuf, WorkloadKey>,
    /// Workloads of this node that are listed without `enroll`: that is how the file takes one out
    /// of the mesh.
    left: BTreeSet<WorkloadKey>,
}

impl<'a> Workloads<'a> {
    pub(super) fn new(
        check: Check<'a>,
        node: &'a str,
        trust_domain: &'a TrustDomain,
        issuer: &'a IssuerConfig,
        modes: ModeDefaults,
    ) -> Self {
        let (known, namespaces, left) = (HashMap::new(), HashMap::new(), BTreeSet::new());
        Self { check, node, trust_domain, issuer, modes, known, namespaces, left }
    }

    /// Says in the snapshot which workloads the file takes out of the mesh.
    pub(super) fn departures(&mut self, builder: &mut SnapshotBuilder) {
        let workloads = std::mem::take(&mut self.left);
        builder.departures(Departures { in_sync: true, workloads, ..Departures::default() });
    }

    /// The workloads added, for services to refer to.
    pub(super) fn into_known(self) -> HashMap<WorkloadKey, Arc<Workload>> {
        self.known
    }

    pub(super) fn add(
        &mut self,
        builder: &mut SnapshotBuilder,
        index: usize,
        entry: &Spanned<schema::Workload>,
    ) -> Result<(), ConfigError> {
        let (check, w) = (self.check, &entry.value);
        let at = |field: &str| format!("workloads[{index}]{}{field}", if field.is_empty() { "" } else { "." });
        check.name("name", &at("name"), &w.name)?;
        check.name("namespace", &at("namespace"), &w.namespace)?;
        if let Some(account) = &w.service_account {
            check.name("service account", &at("serviceAccount"), account)?;
        }
        let key = WorkloadKey { namespace: w.namespace.value.as_str().into(), name: w.name.value.as_str().into() };
        let trust_domain = match &w.trust_domain {
            Some(td) => check.parsed(&at("trustDomain"), td)?,
            None => self.trust_domain.clone(),
        };
        let account = w.service_account.as_ref().map_or(DEFAULT_SERVICE_ACCOUNT, |a| &a.value);
        let identity = SpiffeId::new(trust_domain, &key.namespace, account)
            .map_err(|e| check.error(entry.referenced, &at(""), e))?;
        let node = match &w.node {
            Some(n) => {
                check.name("node", &at("node"), n)?;
                n.value.as_str()
            }
            None => self.node,
        };
        let mut addresses = Vec::with_capacity(w.addresses.len());
        for (i, text) in w.addresses.iter().enumerate() {
            let field = at(&format!("addresses[{i}]"));
            let address = check.address(&field, text)?;
            if addresses.contains(&address) {
                return Err(check.wrong(text, &field, format!("address {address} is listed twice; remove one")));
            }
            addresses.push(address);
        }
        let protocol = match w.protocol {
            schema::Protocol::Underpass => Protocol::Underpass,
            schema::Protocol::Plain => Protocol::Plain,
        };
        let mut local = None;
        if let Some(enroll) = &w.enroll {
            if node != self.node {
                let problem = format!(
                    "{key} runs on node {node}, and this node is {}; only a node's own workloads are enrolled: remove enroll or correct node",
                    self.node
                );
                return Err(check.wrong(enroll, &at("enroll"), problem));
            }
            if protocol == Protocol::Plain {
                let problem = format!(
                    "{key} is enrolled, so peers reach it through the tunnel; remove protocol: plain, or enroll"
                );
                return Err(check.wrong(enroll, &at("enroll"), problem));
            }
            local = Some(self.local_pod(&at("enroll"), &key, &enroll.value, enroll.referenced)?);
        } else if node == self.node {
            self.left.insert(key.clone());
        }
        let mode = self.mode(w, &at("mode"), protocol, &key.namespace)?;
        let policy = WorkloadPolicy {
            labels: labels(check, &at("labels"), &w.labels)?,
            policies: Vec::new(),
            mode_set_by: mode.set_by,
        };
        let workload = Workload {
            identity,
            node: node.into(),
            protocol,
            mode: mode.mode,
            port_modes: port_modes(check, &at("ports"), &w.ports)?,
            local,
            addresses: addresses.clone(),
            key: key.clone(),
        };
        let added = builder.workload(workload).map_err(|e| {
            let place = match &e {
                BuildError::DuplicateAddress { address, .. } | BuildError::UnusableAddress { address, .. } => {
                    addresses.iter().position(|a| a == address)
                }
                _ => None,
            };
            match place {
                Some(i) => check.wrong(&w.addresses[i], &at(&format!("addresses[{i}]")), e),
                None => check.wrong(&w.name, &at("name"), e),
            }
        })?;
        builder.workload_policy(&key, policy);
        self.known.insert(key, added);
        Ok(())
    }

    fn mode(
        &self,
        w: &schema::Workload,
        field: &str,
        protocol: Protocol,
        namespace: &str,
    ) -> Result<EffectiveMode, ConfigError> {
        match (&w.mode, protocol) {
            (Some(m), Protocol::Plain) if m.value == Mode::Strict => Err(self.check.wrong(
                m,
                field,
                "a workload with protocol: plain is reached by plaintext only, which strict refuses; remove one of them",
            )),
            (_, Protocol::Plain) => Ok(EffectiveMode { mode: InboundMode::Permissive, set_by: ModeSource::Workload }),
            (own, Protocol::Underpass) => Ok(self.modes.resolve(namespace, own.as_ref().map(|m| mode(m.value)))),
        }
    }

    fn local_pod(
        &mut self,
        field: &str,
        key: &WorkloadKey,
        enroll: &Enroll,
        at: Location,
    ) -> Result<LocalPod, ConfigError> {
        let check = self.check;
        let netns_field = format!("{field}.netns");
        let netns = check.path(&netns_field, &enroll.netns)?;
        if let Some(other) = self.namespaces.insert(netns.clone(), key.clone()) {
            let problem = format!(
                "network namespace {} already belongs to workload {other}; a pod has its own, or enrol only one of them",
                netns.display()
            );
            return Err(check.wrong(&enroll.netns, &netns_field, problem));
        }
        let cgroup = match &enroll.cgroup {
            Some(c) => Some(check.path(&format!("{field}.cgroup"), c)?),
            None => None,
        };
        let field_certificate = format!("{field}.certificate");
        let files = match (self.issuer, &enroll.certificate) {
            (IssuerConfig::Files, Some(c)) => Some(CertificateFiles {
                certificate: check.path(&format!("{field_certificate}.certificate"), &c.value.certificate)?,
                key: check.path(&format!("{field_certificate}.key"), &c.value.key)?,
                roots: check.path(&format!("{field_certificate}.roots"), &c.value.roots)?,
            }),
            (IssuerConfig::Files, None) => {
                let problem = format!(
                    "{key} has no certificate and the issuer is files; add certificate: {{certificate: ..., key: ..., roots: ...}}"
                );
                return Err(check.error(at, field, problem));
            }
            (other, Some(c)) => {
                let problem = format!(
                    "certificate paths are read by the files issuer only, and the issuer is {other}; remove them"
                );
                return Err(check.wrong(c, &field_certificate, problem));
            }
            (_, None) => None,
        };
        Ok(LocalPod {
            uid: None,
            netns: PodNamespace::at(netns),
            cgroup,
            exclude: check.exclusions(&format!("{field}.exclude"), &enroll.exclude)?,
            capture_all: enroll.capture_all,
            probe_ports: check.ports(&format!("{field}.probePorts"), &enroll.probe_ports)?,
            files,
        })
    }
}

fn port_modes(check: Check<'_>, field: &str, ports: &[schema::WorkloadPort]) -> Result<Vec<PortMode>, ConfigError> {
    let mut seen = HashSet::new();
    let mut out = Vec::with_capacity(ports.len());
    for (i, p) in ports.iter().enumerate() {
        let field = format!("{field}[{i}].port");
        let port = check.port(&field, &p.port)?;
        if !seen.insert(port) {
            return Err(check.wrong(&p.port, &field, format!("port {port} is listed twice; remove one")));
        }
        out.push(PortMode { port, mode: mode(p.mode) });
    }
    Ok(out)
}
