//! The control plane's programs and certificates.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use testbed::{
    addresses::{PODS_V4, VIPS_V4},
    kube::{Pki, User},
};

use super::{
    network,
    programs::{Inside, Stage},
};

/// Where the API server listens.
pub(super) const API_PORT: u16 = 6443;
/// Where etcd listens, in the control plane's namespace only.
const ETCD: &str = "http://127.0.0.1:2379";
/// Issuer of service accounts' tokens.
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// How long each program may take to be of use, on a machine that is busy.
const START: Duration = Duration::from_mins(2);

/// The API's address for nodes and pods.
pub(super) fn url() -> String {
    format!("https://{}:{API_PORT}", network::api())
}

/// A running control plane.
pub(super) struct Control {
    pub(super) pki: Pki,
    kubectl: PathBuf,
    kubeconfig: PathBuf,
}

impl Control {
    /// Starts it, and waits until the API is ready.
    pub(super) fn start(stage: &mut Stage<'_>) -> Result<Self> {
        let pki = Pki::create(&stage.place.file("pki"))?;
        let port = attend(stage)?;
        let config = pki.kubeconfig(&User::admin(), &format!("https://127.0.0.1:{port}"), "here")?;
        let control = Self { pki, kubectl: stage.part("kubectl"), kubeconfig: stage.place.file("kubeconfig") };
        // With the mode of the original: only root reads it.
        fs::copy(&config, &control.kubeconfig).context("copying the administrator's kubeconfig")?;

        let namespace = stage.place.namespace("api");
        let inside = Inside::Network(&namespace);
        let data = format!("--data-dir={}", stage.place.file("etcd").display());
        let (listen, advertise) = (format!("--listen-client-urls={ETCD}"), format!("--advertise-client-urls={ETCD}"));
        let etcd = stage.part("etcd");
        let mut arguments = vec![text(&etcd), &data, &listen, &advertise, "--listen-peer-urls=http://127.0.0.1:2380"];
        // Nothing has to survive this machine.
        arguments.extend(["--unsafe-no-fsync", "--logger=zap", "--log-level=warn"]);
        stage.start("etcd", inside, &arguments)?;

        let api = control.api_arguments()?;
        stage.start("kube-apiserver", inside, &words(&stage.part("kube-apiserver"), &api))?;
        let ready = || Ok((control.kubectl(&["get", "--raw=/readyz"])?.trim() == "ok").then_some(()));
        stage.wait("the API server's readiness", START, ready)?;
        for (name, more) in [
            ("kube-controller-manager", control.controller_arguments()),
            ("kube-scheduler", vec!["--leader-elect=false".to_owned(), "--bind-address=127.0.0.1".into()]),
        ] {
            let config = control.pki.kubeconfig(&User::new(&format!("system:{name}")), &url(), "api")?;
            let options = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"];
            let configs = options.iter().map(|option| format!("--{option}={}", config.display()));
            let arguments: Vec<_> = configs.chain(more).collect();
            stage.start(name, inside, &words(&stage.part(name), &arguments))?;
        }
        Ok(control)
    }

    /// kubectl as the administrator.
    pub(super) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig).arg("--request-timeout=30s").args(arguments);
        crate::exec::output(&mut command)
    }

    fn api_arguments(&self) -> Result<Vec<String>> {
        let file = |name: &str| self.pki.file(name).display().to_string();
        let [certificate, key] = self.pki.certificate(&User::admin())?;
        Ok(vec![
            format!("--etcd-servers={ETCD}"),
            "--bind-address=0.0.0.0".into(),
            format!("--advertise-address={}", network::api()),
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
            // For `kubectl logs` and `exec`. Kubelets have certificates that they made themselves.
            format!("--kubelet-client-certificate={}", certificate.display()),
            format!("--kubelet-client-key={}", key.display()),
            "--kubelet-preferred-address-types=InternalIP".into(),
            format!("--cert-dir={}", file("")),
        ])
    }

    fn controller_arguments(&self) -> Vec<String> {
        let file = |name: &str| self.pki.file(name).display().to_string();
        vec![
            format!("--root-ca-file={}", file("ca.crt")),
            format!("--service-account-private-key-file={}", file("service-accounts.key")),
            format!("--cluster-signing-cert-file={}", file("ca.crt")),
            format!("--cluster-signing-key-file={}", file("ca.key")),
            format!("--cert-dir={}", file("")),
            format!("--cluster-cidr={PODS_V4}"),
            "--allocate-node-cidrs=false".into(),
            "--use-service-account-credentials=true".into(),
            "--leader-elect=false".into(),
            "--bind-address=127.0.0.1".into(),
        ]
    }
}

/// Starts the process that looks after everything; the port that leads to the API.
fn attend(stage: &mut Stage<'_>) -> Result<u16> {
    let this = std::env::current_exe().context("finding the running executable")?;
    let (logs, namespace) = (stage.place.logs(), stage.place.namespace("api"));
    let arguments = [text(&this), "cluster", "attend", "--namespace", &namespace, "--logs", text(&logs)];
    let mut child = stage.start_piped("attendant", Inside::Machine, &arguments)?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("its output is piped")?)
        .read_line(&mut line)
        .context("waiting for the attendant's port")?;
    line.trim().parse().with_context(|| format!("the attendant said no port but {line:?}; see {}", logs.display()))
}

pub(super) fn words<'a>(program: &'a Path, arguments: &'a [String]) -> Vec<&'a str> {
    std::iter::once(text(program)).chain(arguments.iter().map(String::as_str)).collect()
}

/// A path of the playground's, which `up` has found to be text.
pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("checked before anything is started")
}
