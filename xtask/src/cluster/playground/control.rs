//! The control plane's programs and certificates.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use testbed::{
    addresses::PODS_V4,
    kube::{Pki, User, arguments},
};

use super::{
    place::Place,
    programs::{Inside, Stage},
};

/// How long each program may take to be of use, on a machine that is busy.
const START: Duration = Duration::from_mins(2);

/// A running control plane.
pub(super) struct Control {
    pub(super) pki: Pki,
    pub(super) kubectl: Kubectl,
}

/// kubectl as the administrator.
pub(super) struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Control {
    /// Starts it, and waits until the API is ready.
    pub(super) fn start(stage: &mut Stage<'_>) -> Result<Self> {
        let pki = Pki::create(&stage.place.file("pki"))?;
        let port = attend(stage)?;
        let config = pki.kubeconfig(&User::admin(), &format!("https://127.0.0.1:{port}"), "here")?;
        let kubectl = Kubectl::of(stage.place, stage.parts);
        // With the mode of the original: only root reads it.
        fs::copy(&config, &kubectl.kubeconfig).context("copying the administrator's kubeconfig")?;
        let control = Self { pki, kubectl };

        let namespace = stage.place.namespace("api");
        let inside = Inside::Network(&namespace);
        let etcd = arguments::etcd(&stage.place.file("etcd"));
        stage.start("etcd", inside, &words(&stage.part("etcd"), &etcd))?;
        let api = control.api_arguments()?;
        stage.start("kube-apiserver", inside, &words(&stage.part("kube-apiserver"), &api))?;
        let ready = || Ok((control.kubectl.run(&["get", "--raw=/readyz"])?.trim() == "ok").then_some(()));
        stage.wait("the API server's readiness", START, ready)?;
        for (name, more) in
            [("kube-controller-manager", control.controller_arguments()), ("kube-scheduler", Vec::new())]
        {
            let mut arguments = arguments::component(&control.pki, name, "api")?;
            arguments.extend(more);
            stage.start(name, inside, &words(&stage.part(name), &arguments))?;
        }
        control.start_dns(stage, inside)?;
        Ok(control)
    }

    fn start_dns(&self, stage: &mut Stage<'_>, inside: Inside<'_>) -> Result<()> {
        let this = std::env::current_exe().context("finding the running executable")?;
        let config = self.pki.kubeconfig(&User::admin(), &arguments::url(), "api")?;
        let kubectl = stage.part("kubectl");
        let arguments = ["cluster", "dns", "--kubectl", text(&kubectl), "--kubeconfig", text(&config)];
        let program: Vec<_> = [text(&this)].into_iter().chain(arguments).collect();
        stage.start("dns", inside, &program).map(drop)
    }

    fn api_arguments(&self) -> Result<Vec<String>> {
        let [certificate, key] = self.pki.certificate(&User::admin())?;
        let mut arguments = arguments::api_server(&self.pki);
        // For `kubectl logs` and `exec`. Kubelets have certificates that they made themselves.
        arguments.extend([
            format!("--kubelet-client-certificate={}", certificate.display()),
            format!("--kubelet-client-key={}", key.display()),
            "--kubelet-preferred-address-types=InternalIP".into(),
        ]);
        Ok(arguments)
    }

    fn controller_arguments(&self) -> Vec<String> {
        let file = |name: &str| self.pki.file(name).display().to_string();
        let mut arguments = arguments::controller_manager(&self.pki);
        arguments.extend([
            format!("--cluster-signing-cert-file={}", file("ca.crt")),
            format!("--cluster-signing-key-file={}", file("ca.key")),
            format!("--cluster-cidr={PODS_V4}"),
            "--allocate-node-cidrs=false".into(),
        ]);
        arguments
    }
}

impl Kubectl {
    /// For the playground at `place`, with the programs in `parts`.
    pub(super) fn of(place: &Place, parts: &Path) -> Self {
        Self { program: parts.join("bin/kubectl"), kubeconfig: place.kubeconfig() }
    }

    /// What it prints, when it succeeds.
    pub(super) fn run(&self, arguments: &[&str]) -> Result<String> {
        crate::exec::output(&mut self.command(arguments))
    }

    /// Creates or changes what `manifests` describe.
    pub(super) fn apply(&self, manifests: &str) -> Result<()> {
        let mut command = self.command(&["apply", "--filename=-"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting kubectl")?;
        // Why it failed is in its output, not in a broken pipe.
        let _ = child.stdin.take().context("its input is piped")?.write_all(manifests.as_bytes());
        let output = child.wait_with_output().context("waiting for kubectl")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl apply failed ({}): {}", output.status, said.trim());
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).arg("--request-timeout=30s").args(arguments);
        command
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
