//! Writes an agent's configuration for the pods of a testbed.

use std::{net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{addresses, node::Node, pod::Pod};

/// A mesh: one description, of which every node gets its own document.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshConfig {
    /// Trust domain of every identity that says nothing else.
    pub trust_domain: String,
    /// Directory of the embedded CA that the nodes share; `None`: certificates from files.
    pub ca_dir: Option<PathBuf>,
    /// Lifetime of a certificate of the embedded CA, e.g. `1h`.
    pub lifetime: String,
    /// Mode of workloads that say nothing else.
    pub mode: Mode,
    /// How refused plaintext is answered, when not as by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plaintext_refusal: Option<String>,
    /// Capture every TCP destination.
    pub capture_all: bool,
    /// Networks captured beside the workloads' addresses and the VIPs.
    pub cidrs: Vec<String>,
    /// What no pod has captured.
    pub exclude: Exclude,
    /// Workloads.
    pub workloads: Vec<Workload>,
    /// Services.
    pub services: Vec<Service>,
    /// Who sends probes, as the configuration has it; nobody by default.
    #[serde(default)]
    pub probes: Probes,
    /// Authorization policies, as the configuration has them.
    #[serde(default)]
    pub policies: Vec<serde_json::Value>,
}

/// What to do with plaintext from outside the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Accept it.
    Permissive,
    /// Refuse it.
    Strict,
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The encrypted tunnel.
    Underpass,
    /// Plain TCP.
    Plain,
}

/// Mode of one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMode {
    /// The port.
    pub port: u16,
    /// Its mode.
    pub mode: Mode,
}

/// What is left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exclude {
    /// Destination ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outbound_ports: Vec<u16>,
    /// Destination networks.
    #[serde(default, rename = "outboundCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub outbound_cidrs: Vec<String>,
    /// Ports of the workload's own on which plaintext passes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inbound_ports: Vec<u16>,
}

/// How kubelet probes are recognised.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probes {
    /// cgroup v2 paths, as `/proc/PID/cgroup` has them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroups: Vec<PathBuf>,
    /// The nodes' own addresses, where declared ports are open to them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub node_addresses: Vec<IpAddr>,
}

/// PEM files of an identity, for the issuer `files`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateFiles {
    /// Certificate chain, leaf first.
    #[serde(rename = "certificate")]
    pub chain: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// Roots for peers.
    pub roots: PathBuf,
}

/// Where a pod is; only in the document of its own node.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Enroll {
    /// Network namespace.
    pub netns: PathBuf,
    /// cgroup v2 directory.
    pub cgroup: PathBuf,
    /// Capture every TCP destination of this pod.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub capture_all: bool,
    /// The pod's own exclusions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Exclude>,
    /// Ports that take the kubelet's plaintext.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probe_ports: Vec<u16>,
    /// Certificate files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateFiles>,
}

/// A workload.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Name; the pod's, unless changed.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Service account: with namespace and trust domain it is the identity.
    pub service_account: String,
    /// Trust domain, when it is not the mesh's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
    /// Node that it runs on.
    pub node: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// How it is reached.
    pub protocol: Protocol,
    /// Mode; the mesh's when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Ports with another mode.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortMode>,
    /// How it is enrolled; `None` for a pod without an agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enroll: Option<Enroll>,
}

/// A service with one VIP per family.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    /// Name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Host name.
    pub hostname: String,
    /// Virtual addresses.
    pub vips: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// A port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Port on the VIP.
    pub port: u16,
    /// Port on the endpoints.
    pub target_port: u16,
}

/// A workload behind a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// `namespace/name`.
    pub workload: String,
    /// Target ports that differ from the service's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ServicePort>,
}

/// The document that an agent reads.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    api_version: &'a str,
    kind: &'a str,
    node: &'a str,
    trust_domain: &'a str,
    issuer: serde_json::Value,
    mesh: Mesh<'a>,
    probes: &'a Probes,
    workloads: Vec<Workload>,
    services: &'a [Service],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    policies: &'a [serde_json::Value],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Mesh<'a> {
    mode: Mode,
    #[serde(skip_serializing_if = "Option::is_none")]
    plaintext_refusal: Option<&'a str>,
    capture_all: bool,
    cidrs: &'a [String],
    exclude: &'a Exclude,
}

impl MeshConfig {
    /// A PERMISSIVE mesh without workloads, with an embedded CA in `ca_dir`.
    pub fn new(ca_dir: impl Into<PathBuf>) -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            ca_dir: Some(ca_dir.into()),
            lifetime: "1h".into(),
            mode: Mode::Permissive,
            plaintext_refusal: None,
            capture_all: false,
            cidrs: Vec::new(),
            exclude: Exclude::default(),
            workloads: Vec::new(),
            services: Vec::new(),
            probes: Probes::default(),
            policies: Vec::new(),
        }
    }

    /// Adds an enrolled pod: namespace `default`, its name as service account. The entry is returned for changes.
    pub fn enroll(&mut self, pod: &Pod) -> &mut Workload {
        let enroll = Enroll {
            netns: pod.namespace().path(),
            cgroup: pod.cgroup().to_path_buf(),
            capture_all: false,
            exclude: None,
            probe_ports: Vec::new(),
            certificate: None,
        };
        self.push(pod, Protocol::Underpass, Some(enroll))
    }

    /// Adds a pod that the mesh knows but that is not in it.
    pub fn plain(&mut self, pod: &Pod) -> &mut Workload {
        self.push(pod, Protocol::Plain, None)
    }

    fn push(&mut self, pod: &Pod, protocol: Protocol, enroll: Option<Enroll>) -> &mut Workload {
        self.workloads.push(Workload {
            name: pod.name().to_owned(),
            namespace: "default".into(),
            service_account: pod.name().to_owned(),
            trust_domain: None,
            node: pod.node().name().to_owned(),
            addresses: vec![pod.ipv4().into(), pod.ipv6().into()],
            protocol,
            mode: None,
            ports: Vec::new(),
            enroll,
        });
        self.workloads.last_mut().expect("just pushed")
    }

    /// Adds the service `name` with VIP number `vip` ([`addresses::vips`]) and `ports` (port, target port) in front of `pods`.
    pub fn service(&mut self, name: &str, vip: u8, ports: &[(u16, u16)], pods: &[&Pod]) -> &mut Service {
        self.services.push(Service {
            name: name.to_owned(),
            namespace: "default".into(),
            hostname: format!("{name}.default.svc.cluster.local"),
            vips: addresses::vips(vip).into(),
            ports: ports.iter().map(|&(port, target_port)| ServicePort { port, target_port }).collect(),
            endpoints: pods
                .iter()
                .map(|pod| Endpoint { workload: format!("default/{}", pod.name()), ports: Vec::new() })
                .collect(),
        });
        self.services.last_mut().expect("just pushed")
    }

    /// The workload named `name`.
    ///
    /// # Panics
    /// When there is none.
    pub fn workload(&mut self, name: &str) -> &mut Workload {
        self.workloads.iter_mut().find(|w| w.name == name).unwrap_or_else(|| panic!("no workload is called {name:?}"))
    }

    /// The document for `node`'s agent (JSON, which is YAML too).
    pub fn document(&self, node: &Node) -> String {
        let mut workloads = self.workloads.clone();
        for workload in &mut workloads {
            if workload.node != node.name() {
                workload.enroll = None;
            }
        }
        let issuer = self.ca_dir.as_ref().map_or_else(
            || serde_json::json!({ "files": {} }),
            |ca_dir| serde_json::json!({ "local": { "caDir": ca_dir, "lifetime": self.lifetime } }),
        );
        let document = Document {
            api_version: "underpass.io/v1alpha1",
            kind: "NodeConfig",
            node: node.name(),
            trust_domain: &self.trust_domain,
            issuer,
            mesh: Mesh {
                mode: self.mode,
                plaintext_refusal: self.plaintext_refusal.as_deref(),
                capture_all: self.capture_all,
                cidrs: &self.cidrs,
                exclude: &self.exclude,
            },
            probes: &self.probes,
            workloads,
            services: &self.services,
            policies: &self.policies,
        };
        serde_json::to_string_pretty(&document).expect("plain data")
    }
}
