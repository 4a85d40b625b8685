//! The control plane's programs: started, stopped, started again with the same data.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use super::{
    arguments::{self, API_PORT, ETCD, url},
    keeper::Keeper,
    network,
    parts::Parts,
    pki::{Pki, User},
    relay::Relay,
};
use crate::{
    Testbed,
    namespace::Namespace,
    pace::patience,
    pod::command_in,
    process::{Process, Stream},
};

/// How long each program may take to be of use.
const START: Duration = Duration::from_mins(2);
/// How long the API server may take to end politely: its watches would keep it for a minute.
const STOP: Duration = Duration::from_secs(2);
/// It need not log what it is waited for, so it is asked again after this long.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// Controllers that would undo what a test says of nodes and pods, because no kubelet confirms it.
const WITHOUT: &str = "*,-nodelifecycle,-podgc";

/// How to start a control plane.
#[derive(Debug, Clone, Default)]
pub struct ControlPlaneOptions {
    /// Further arguments of kube-apiserver, e.g. `--min-request-timeout=5`, which ends watches after 5 to 10 s.
    pub api_arguments: Vec<String>,
    /// Further arguments of kube-controller-manager. A second `--controllers=-name` adds to the first.
    pub controller_arguments: Vec<String>,
}

/// A running control plane. Dropping it kills its programs; the testbed removes the rest.
///
/// The fields drop in order: who asks before who answers.
pub struct ControlPlane {
    relay: Relay,
    controllers: Option<Process>,
    api: Option<Process>,
    etcd: Process,
    keeper: Keeper,
    options: ControlPlaneOptions,
    admin: PathBuf,
    pki: Pki,
    parts: Parts,
    namespace: Namespace,
    cgroup: PathBuf,
    directory: PathBuf,
}

impl ControlPlane {
    /// Starts the one control plane of `testbed`, and waits until the API is ready and controllers work.
    pub fn start(testbed: &Testbed, parts: Parts, options: ControlPlaneOptions) -> Result<Self> {
        let shared = &testbed.shared;
        let (directory, cgroup) = (shared.dir.join("kube"), shared.cgroup.join("kube"));
        ensure!(!cgroup.exists(), "testbed {} has a control plane already", shared.id);
        for path in [&directory, &cgroup] {
            fs::create_dir(path).with_context(|| format!("creating {}", path.display()))?;
        }
        let namespace = network::create(testbed, shared)?;
        let pki = Pki::create(&directory.join("pki"))?;
        let keeper = Keeper::new()?;
        let relay = Relay::start(&namespace, SocketAddr::from((Ipv4Addr::LOCALHOST, API_PORT)))?;
        let admin = pki.kubeconfig(&User::admin(), &url(), "nodes")?;

        let mut command = contained(&cgroup, &namespace, &parts.program("etcd")?);
        command.args(arguments::etcd(&directory.join("etcd")));
        let etcd = keeper.spawn(command)?;
        let mut plane = Self {
            relay,
            controllers: None,
            api: None,
            etcd,
            keeper,
            options,
            admin,
            pki,
            parts,
            namespace,
            cgroup,
            directory,
        };
        plane.start_api()?;
        plane.start_controllers()?;
        Ok(plane)
    }

    /// The API's address for nodes and pods.
    pub fn url(&self) -> String {
        url()
    }

    /// The API's address for the test's own process.
    ///
    /// While the API server is away, connections there are accepted and closed; those to [`url`](Self::url) are refused.
    pub fn url_here(&self) -> String {
        format!("https://{}", self.relay.address())
    }

    /// The certificate, PEM, that the API server's is to be verified with.
    pub fn ca(&self) -> String {
        self.pki.ca()
    }

    /// The same as a file.
    pub fn ca_file(&self) -> PathBuf {
        self.pki.file("ca.crt")
    }

    /// A kubeconfig for `user` on a node or in a pod, with a new certificate.
    pub fn kubeconfig(&self, user: &User) -> Result<PathBuf> {
        self.pki.kubeconfig(user, &self.url(), "nodes")
    }

    /// A kubeconfig for `user` in the test's own process, with a new certificate.
    pub fn kubeconfig_here(&self, user: &User) -> Result<PathBuf> {
        self.pki.kubeconfig(user, &self.url_here(), "here")
    }

    /// Its network namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Starts the API server, with the same data and address as before, and waits until it is ready.
    pub fn start_api(&mut self) -> Result<()> {
        ensure!(self.api.as_ref().is_none_or(|api| api.status().is_some()), "the API server runs already");
        let mut command = contained(&self.cgroup, &self.namespace, &self.parts.program("kube-apiserver")?);
        command.args(arguments::api_server(&self.pki)).args(&self.options.api_arguments);
        self.api = Some(self.keeper.spawn(command)?);
        self.wait_ready()
    }

    /// Ends the API server, at once for those who watch; etcd and the controllers stay.
    pub fn stop_api(&mut self) -> Result<()> {
        let api = self.api.take().context("the API server does not run")?;
        api.signal(Signal::SIGTERM)?;
        if api.wait(STOP).is_err() {
            api.kill()?;
        }
        Ok(())
    }

    /// Stops the API server and starts it with other further arguments. Its memory of changes is gone: who resumes a watch from
    /// before is told 410 Gone as soon as anything was written since.
    pub fn restart_api_with(&mut self, arguments: &[&str]) -> Result<()> {
        self.stop_api()?;
        self.options.api_arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        self.start_api()
    }

    /// Makes etcd forget all revisions but the current one, which is returned. An API server with `--watch-cache=false` answers 410 Gone for
    /// older ones.
    pub fn compact_etcd(&self) -> Result<u64> {
        let etcdctl = |arguments: &[&str]| -> Result<String> {
            let mut command = contained(&self.cgroup, &self.namespace, &self.parts.program("etcdctl")?);
            command.env("ETCDCTL_API", "3").arg(format!("--endpoints={ETCD}")).args(arguments);
            Process::spawn(&mut command)?.output(Duration::from_secs(20))?.success()
        };
        let status = etcdctl(&["endpoint", "status", "--write-out=json"])?;
        let value: serde_json::Value = serde_json::from_str(&status).context("reading etcd's status")?;
        let revision = value[0]["Status"]["header"]["revision"].as_u64();
        let revision = revision.with_context(|| format!("no revision in etcd's status: {status}"))?;
        etcdctl(&["compact", &revision.to_string()])?;
        Ok(revision)
    }

    /// What its programs have logged since their last start, with their names.
    pub fn log(&self) -> String {
        let programs = [
            ("etcd", Some(&self.etcd)),
            ("kube-apiserver", self.api.as_ref()),
            ("kube-controller-manager", self.controllers.as_ref()),
        ];
        let text = |process: &Process| process.text(Stream::Stderr) + &process.text(Stream::Stdout);
        let shown = programs.iter().filter_map(|(name, process)| Some(format!("--- {name}\n{}", text((*process)?))));
        shown.collect()
    }

    fn start_controllers(&mut self) -> Result<()> {
        let name = "kube-controller-manager";
        let mut command = contained(&self.cgroup, &self.namespace, &self.parts.program(name)?);
        command.args(arguments::component(&self.pki, name, "nodes")?).args(arguments::controller_manager(&self.pki));
        command.arg(format!("--controllers={WITHOUT}"));
        command.args(&self.options.controller_arguments);
        self.controllers = Some(self.keeper.spawn(command)?);
        // Its first work that can be seen. A watch ends early where the API server was told to end them.
        let deadline = Instant::now() + patience(START);
        loop {
            let accounts = self.kubectl_spawn(&["get", "serviceaccounts", "--watch", "--output=name"])?;
            match accounts.wait_line("serviceaccount/default", START) {
                Ok(_) => return Ok(()),
                Err(_) if accounts.status().is_some() && Instant::now() < deadline => {}
                Err(error) => return Err(error.context(format!("waiting for the controllers:\n{}", tail(&self.log())))),
            }
        }
    }

    /// Waits for `/readyz`, which is more than the first answer: the roles of the system's users come after it.
    fn wait_ready(&self) -> Result<()> {
        let api = self.api.as_ref().context("the API server does not run")?;
        let within = patience(START);
        let deadline = Instant::now() + within;
        let mut seen = 0;
        loop {
            let mut curl = self.command(Path::new("curl"));
            curl.args(["--silent", "--show-error", "--max-time", "10", "--cacert"]).arg(self.pki.file("ca.crt"));
            let answer = Process::spawn(curl.arg(format!("{}/readyz", self.url())))?.output(Duration::from_secs(20))?;
            if answer.stdout.trim() == "ok" {
                return Ok(());
            }
            for (name, process) in [("etcd", &self.etcd), ("kube-apiserver", api)] {
                if let Some(status) = process.status() {
                    bail!("{name} has ended ({status}):\n{}", tail(&self.log()));
                }
            }
            if Instant::now() >= deadline {
                let said = format!("{}{}", answer.stdout, answer.stderr);
                bail!("the API server is not ready after {within:?}, it says {said:?}:\n{}", tail(&self.log()));
            }
            api.wait_activity(&mut seen, ASK_AGAIN);
        }
    }

    /// A program in the control plane's namespace and cgroup.
    pub(super) fn command(&self, program: &Path) -> Command {
        contained(&self.cgroup, &self.namespace, program)
    }

    /// The directory of its files.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    pub(super) fn admin(&self) -> &Path {
        &self.admin
    }
}

/// A command that moves itself into the cgroup and the namespace and dies with the thread that starts it.
fn contained(cgroup: &Path, namespace: &Namespace, program: &Path) -> Command {
    let mut command = command_in(Some(cgroup), namespace, Path::new("setpriv"));
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

/// The last lines of a long text.
fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}
