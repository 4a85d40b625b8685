//! A playground of the test's own, driven by the commands that people have.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use testbed::{Namespace, Output, Process};

/// `cargo xtask`.
const XTASK: &str = env!("CARGO_BIN_EXE_xtask");
/// How the names of tests' playgrounds begin; a process number follows.
const PREFIX: &str = "install-";
/// How long one command may take: the longest start a cluster, or wait until Underpass is installed.
const WITHIN: Duration = Duration::from_mins(5);
/// Environment variable with the name of a cluster to use and to leave there, for somebody who wants to look at it or to run a scenario again.
const KEEP: &str = "UNDERPASS_KEEP_CLUSTER";
/// Lines of a log that are shown when something fails.
const SHOWN: usize = 20;

/// A running cluster. Dropping it removes it.
pub(crate) struct Cluster {
    name: String,
    about: About,
    keep: bool,
}

/// What `cluster status --json` says.
#[derive(Deserialize)]
struct About {
    kubeconfig: PathBuf,
    programs: PathBuf,
    logs: PathBuf,
    nodes: Vec<Node>,
}

/// A node.
#[derive(Deserialize)]
pub(crate) struct Node {
    pub(crate) name: String,
    namespace: String,
    cgroup: PathBuf,
}

impl Cluster {
    /// Removes what killed tests have left, and starts a cluster.
    pub(crate) fn up() -> Result<Self> {
        sweep()?;
        let kept = std::env::var(KEEP).ok();
        let (keep, name) = (kept.is_some(), kept.unwrap_or_else(|| format!("{PREFIX}{}", std::process::id())));
        if !keep {
            // SIGINT, SIGTERM and SIGHUP remove it, too.
            let interrupted = name.clone();
            let remove = move || {
                down(&interrupted);
                std::process::exit(130);
            };
            ctrlc::set_handler(remove).context("handling SIGINT, SIGTERM and SIGHUP")?;
        }
        xtask(&["up", "--bare", "--name", &name])?;
        // From here on it is removed when something fails.
        let nothing =
            About { kubeconfig: PathBuf::new(), programs: PathBuf::new(), logs: PathBuf::new(), nodes: Vec::new() };
        let mut cluster = Self { name, about: nothing, keep };
        let text = xtask(&["status", "--json", "--name", &cluster.name])?;
        cluster.about = serde_json::from_str(&text).with_context(|| format!("`cluster status` printed: {text}"))?;
        Ok(cluster)
    }

    /// `cargo xtask cluster COMMAND --name … ARGUMENTS`.
    pub(crate) fn xtask(&self, command: &str, arguments: &[&str]) -> Result<String> {
        xtask(&[&[command, "--name", &self.name], arguments].concat())
    }

    /// Runs kubectl; its standard output.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.try_kubectl(arguments)?.success()
    }

    /// Runs kubectl, which may fail.
    pub(crate) fn try_kubectl(&self, arguments: &[&str]) -> Result<Output> {
        self.kubectl_spawn(arguments)?.output(WITHIN)
    }

    /// Starts kubectl.
    pub(crate) fn kubectl_spawn(&self, arguments: &[&str]) -> Result<Process> {
        Process::spawn(self.program("kubectl").args(arguments))
    }

    /// One object or a list: `get(&["pods", "--namespace=shop"])`.
    pub(crate) fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "--output=json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {} printed: {text}", arguments.join(" ")))
    }

    /// Creates or changes what `manifests` (YAML or JSON) describe.
    pub(crate) fn apply(&self, manifests: &str) -> Result<()> {
        let mut process = self.kubectl_spawn(&["apply", "--filename=-"])?;
        process.write_stdin(manifests.as_bytes())?;
        process.output(WITHIN)?.success().map(drop)
    }

    /// Runs helm, which may fail.
    pub(crate) fn helm(&self, arguments: &[&str]) -> Result<Output> {
        Process::spawn(self.program("helm").args(arguments))?.output(WITHIN)
    }

    /// A directory that is removed with it.
    pub(crate) fn directory(&self) -> Result<&Path> {
        self.about.logs.parent().context("logs are in the cluster's directory")
    }

    pub(crate) fn nodes(&self) -> &[Node] {
        &self.about.nodes
    }

    /// The first node, and the second.
    pub(crate) fn pair(&self) -> Result<[&Node; 2]> {
        match self.nodes() {
            [first, second] => Ok([first, second]),
            others => bail!("a playground has two nodes, not {}", others.len()),
        }
    }

    /// Runs a shell script on a node, in its network and with its mounts; its standard output.
    pub(crate) fn on(&self, node: &Node, script: &str) -> Result<String> {
        self.xtask("exec", &[&node.name, "--", "sh", "-c", script])
    }

    /// The last of what programs of the cluster have logged.
    pub(crate) fn logs(&self) -> String {
        let entries = fs::read_dir(&self.about.logs).into_iter().flatten().flatten();
        let mut files: Vec<_> = entries.map(|entry| entry.path()).collect();
        files.sort();
        let shown = |path: &PathBuf| {
            let text = fs::read(path).unwrap_or_default();
            format!("--- {}\n{}\n", path.display(), tail(&String::from_utf8_lossy(&text)))
        };
        files.iter().filter(|path| path.to_string_lossy().contains("node-")).map(shown).collect()
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.about.programs.join(name));
        // Caches and settings of the person who runs the test are none of its business.
        command.env("KUBECONFIG", &self.about.kubeconfig).env("HOME", &self.about.logs);
        command
    }
}

impl Node {
    /// Its network.
    pub(crate) fn network(&self) -> Namespace {
        Namespace::existing(&self.namespace)
    }

    /// Numbers of the processes of a pod of it.
    pub(crate) fn processes(&self, uid: &str) -> Result<Vec<i32>> {
        let mut found = Vec::new();
        collect(&self.cgroup, false, &format!("pod{uid}"), &mut found)?;
        Ok(found)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.keep {
            println!("The cluster stays: `cargo xtask cluster down --name {}` removes it.", self.name);
        } else {
            down(&self.name);
        }
    }
}

/// The last lines of a long text.
fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN)..].join("\n")
}

fn xtask(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(XTASK);
    command.arg("cluster").args(arguments).env("CI", "1");
    Process::spawn(&mut command)?.output(WITHIN)?.success()
}

/// Removes a cluster; says what could not be removed, because drops have no other way.
fn down(name: &str) {
    if let Err(error) = xtask(&["down", "--name", name]) {
        eprintln!("{error:#}");
    }
}

/// Removes the clusters of tests that have ended without a word.
fn sweep() -> Result<()> {
    // Programs are in `target/<profile>`, clusters in `target`.
    let target = Path::new(XTASK).ancestors().nth(2).context("xtask is in a target directory")?;
    for entry in fs::read_dir(target).with_context(|| format!("listing {}", target.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(name) = name.strip_prefix("cluster-").filter(|name| name.starts_with(PREFIX)) else { continue };
        let process = name[PREFIX.len()..].parse::<u32>();
        if process.is_ok_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
            down(name);
        }
    }
    Ok(())
}

/// Numbers in the directories below `directory` whose name is `wanted`, and below those.
fn collect(directory: &Path, mut inside: bool, wanted: &str, found: &mut Vec<i32>) -> Result<()> {
    inside |= directory.ends_with(wanted);
    if inside {
        let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    }
    ensure!(directory.exists() || inside, "there is no control group {}", directory.display());
    // Containers come and go meanwhile.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), inside, wanted, found)?;
        }
    }
    Ok(())
}
