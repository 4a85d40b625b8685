//! The command lines of a control plane, for [`ControlPlane`](super::ControlPlane) and for whoever starts the programs himself.

use std::path::Path;

use super::{
    network,
    pki::{Pki, User},
};
use crate::addresses::{VIPS_V4, control_plane_v4};

/// Where the API server listens.
pub const API_PORT: u16 = 6443;
/// Where etcd listens, in the control plane's namespace only.
pub const ETCD: &str = "http://127.0.0.1:2379";
/// Issuer of service accounts' tokens, and the audience of tokens that name none.
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// The API's address for nodes and pods.
pub fn url() -> String {
    format!("https://{}:{API_PORT}", control_plane_v4(network::HOST))
}

/// etcd's, which keeps its data in `data`.
pub fn etcd(data: &Path) -> Vec<String> {
    vec![
        format!("--data-dir={}", data.display()),
        format!("--listen-client-urls={ETCD}"),
        format!("--advertise-client-urls={ETCD}"),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        // Nothing has to survive this machine, and others are waiting for the disk.
        "--unsafe-no-fsync".into(),
        "--logger=zap".into(),
        "--log-level=warn".into(),
    ]
}

/// kube-apiserver's.
pub fn api_server(pki: &Pki) -> Vec<String> {
    let file = |name: &str| pki.file(name).display().to_string();
    vec![
        format!("--etcd-servers={ETCD}"),
        "--bind-address=0.0.0.0".into(),
        format!("--advertise-address={}", control_plane_v4(network::HOST)),
        format!("--secure-port={API_PORT}"),
        format!("--service-cluster-ip-range={VIPS_V4}"),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--tls-cert-file={}", file("apiserver.crt")),
        format!("--tls-private-key-file={}", file("apiserver.key")),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        format!("--service-account-issuer={ISSUER}"),
        format!("--api-audiences={ISSUER}"),
        format!("--service-account-key-file={}", file("service-accounts.pub")),
        format!("--service-account-signing-key-file={}", file("service-accounts.key")),
        format!("--cert-dir={}", file("")),
    ]
}

/// kube-controller-manager's, whose kubeconfig is [`component`]'s business.
pub fn controller_manager(pki: &Pki) -> Vec<String> {
    let file = |name: &str| pki.file(name).display().to_string();
    vec![
        format!("--root-ca-file={}", file("ca.crt")),
        format!("--service-account-private-key-file={}", file("service-accounts.key")),
        format!("--cert-dir={}", file("")),
        "--use-service-account-credentials=true".into(),
    ]
}

/// What kube-controller-manager and kube-scheduler have in common: who they are, and that there is one of each.
pub fn component(pki: &Pki, name: &str, view: &str) -> anyhow::Result<Vec<String>> {
    let config = pki.kubeconfig(&User::new(&format!("system:{name}")), &url(), view)?;
    let options = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"];
    let configs = options.iter().map(|option| format!("--{option}={}", config.display()));
    Ok(configs.chain(["--leader-elect=false", "--bind-address=127.0.0.1"].map(str::to_owned)).collect())
}
