//! An Underpass agent on a node. Only its command line is known here, not its code.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    bpffs,
    node::Node,
    pace::patience,
    process::{Output, Process, Stream},
};

/// How long a command of the CLI may take.
const CLI: Duration = Duration::from_secs(20);
/// How long the agent may take to end after SIGTERM.
const STOP: Duration = Duration::from_secs(30);

/// How to start an agent.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// Further arguments of `underpass run`.
    pub arguments: Vec<String>,
    /// Environment variables, e.g. `RUST_LOG`.
    pub environment: Vec<(String, String)>,
    /// Remove everything pinned when it ends (`--cleanup-on-exit`).
    pub cleanup_on_exit: bool,
    /// How long all pods may take to be enrolled; `None`: do not wait at all.
    pub ready_within: Option<Duration>,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            arguments: Vec::new(),
            environment: Vec::new(),
            cleanup_on_exit: true,
            ready_within: Some(Duration::from_mins(1)),
        }
    }
}

/// A running agent. Dropping it ends it and removes what it pinned.
pub struct Agent {
    node: Node,
    binary: PathBuf,
    options: AgentOptions,
    config: PathBuf,
    process: Option<Process>,
}

impl Agent {
    /// Starts the agent of `node` with a configuration and waits until every pod in it is enrolled.
    pub fn start(node: &Node, binary: &Path, config: &str, options: AgentOptions) -> Result<Self> {
        bpffs::ensure_mounted()?;
        let path = node.dir("agent")?.join("node.yaml");
        let mut agent = Self { node: node.clone(), binary: binary.to_path_buf(), options, config: path, process: None };
        agent.write_config(config)?;
        agent.restart()?;
        Ok(agent)
    }

    /// Starts the agent again after [`stop`](Self::stop) or [`kill`](Self::kill), with the same directories and pins.
    pub fn restart(&mut self) -> Result<()> {
        anyhow::ensure!(self.process.as_ref().is_none_or(|p| p.status().is_some()), "the agent still runs");
        self.process = Some(self.spawn(&[])?);
        match self.options.ready_within {
            Some(within) => self.wait_ready(within),
            None => Ok(()),
        }
    }

    /// Starts another agent that takes over from the running one (`--take-over`), and waits until it has. This value is the new one
    /// then; the old one is returned and goes on until it is told to end.
    pub fn replace(&mut self) -> Result<Process> {
        let new = self.spawn(&["--take-over"])?;
        let old = self.process.replace(new).context("no agent runs")?;
        let log = || format!("the old agent's log:\n{}", old.text(Stream::Stderr));
        self.wait_log("took over", STOP).with_context(log)?;
        self.wait_ready(STOP).with_context(log)?;
        Ok(old)
    }

    fn spawn(&self, further: &[&str]) -> Result<Process> {
        let mut command = self.node.command(&self.binary);
        command.arg("run").arg("--config").arg(&self.config).arg("--cgroup").arg(self.node.pods_cgroup());
        command
            .arg("--pin-root")
            .arg(self.pin_root())
            .arg("--state-dir")
            .arg(self.state_dir()?)
            .arg("--run-dir")
            .arg(self.run_dir()?);
        if self.options.cleanup_on_exit {
            command.arg("--cleanup-on-exit");
        }
        command.args(&self.options.arguments).args(further).envs(self.options.environment.iter().cloned());
        Process::spawn(&mut command)
    }

    /// Replaces the configuration file, atomically. The agent notices by itself.
    pub fn write_config(&self, config: &str) -> Result<()> {
        let new = self.config.with_extension("new");
        fs::write(&new, config).with_context(|| format!("writing {}", new.display()))?;
        fs::rename(&new, &self.config).with_context(|| format!("replacing {}", self.config.display()))
    }

    /// Waits until the agent answers and all its pods are enrolled. A pod that is refused is an error at once.
    pub fn wait_ready(&self, within: Duration) -> Result<()> {
        let expected = self.enrolled_in_config().len();
        self.wait_status(within, |status| {
            let pods =
                status["pods"].as_array().with_context(|| format!("the status has no list of pods: {status}"))?;
            if let Some(refused) = pods.iter().find(|pod| pod["state"] == "refused") {
                bail!("{} was refused: {}", refused["workload"], refused["reason"]);
            }
            Ok(pods.len() >= expected && pods.iter().all(|pod| pod["state"] == "enrolled"))
        })?;
        Ok(())
    }

    /// Waits until `accept` says that the agent's status is what it should be; an error of it ends the waiting.
    pub fn wait_status(&self, within: Duration, accept: impl Fn(&Value) -> Result<bool>) -> Result<Value> {
        self.wait_answer(&["status"], within, accept)
    }

    /// Waits until `accept` says that the agent's list of connections is what it should be.
    pub fn wait_connections(&self, within: Duration, accept: impl Fn(&[Value]) -> bool) -> Result<Vec<Value>> {
        let list = |answer: &Value| answer["connections"].as_array().cloned().unwrap_or_default();
        self.wait_answer(&["connections"], within, |answer| Ok(accept(&list(answer)))).map(|answer| list(&answer))
    }

    fn wait_answer(
        &self,
        question: &[&str],
        within: Duration,
        accept: impl Fn(&Value) -> Result<bool>,
    ) -> Result<Value> {
        /// The agent need not log what it is waited for, so it is asked again after this long.
        const ASK_AGAIN: Duration = Duration::from_millis(100);
        let log = || format!("agent of node {}; its log:\n{}", self.node.name(), self.log());
        let within = patience(within);
        let deadline = Instant::now() + within;
        let mut seen = 0;
        loop {
            let process = self.process()?;
            if process.status().is_some() {
                bail!("it has ended ({}): {}", process.wait(Duration::ZERO)?, log());
            }
            let latest = self.ask(question);
            if let Ok(answer) = &latest
                && accept(answer).with_context(log)?
            {
                return latest;
            }
            if Instant::now() >= deadline {
                bail!("not after {within:?}, the last answer to {question:?} was {latest:?}: {}", log());
            }
            process.wait_activity(&mut seen, ASK_AGAIN);
        }
    }

    /// Waits for a line in the log that contains `text`, also among those already written.
    pub fn wait_log(&self, text: &str, within: Duration) -> Result<String> {
        self.process()?.wait_line(text, within)
    }

    /// Ends the agent with SIGTERM.
    pub fn stop(&mut self) -> Result<()> {
        let process = self.process()?;
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(STOP)?;
        anyhow::ensure!(status.success(), "the agent ended with {status}; its log:\n{}", self.log());
        Ok(())
    }

    /// Kills the agent with SIGKILL; whatever it pinned stays.
    pub fn kill(&mut self) -> Result<()> {
        self.process()?.kill().map(drop)
    }

    /// The running process.
    pub fn process(&self) -> Result<&Process> {
        self.process.as_ref().context("the agent was never started")
    }

    /// What it has logged so far since its last start.
    pub fn log(&self) -> String {
        self.process.as_ref().map_or_else(String::new, |p| p.text(Stream::Stderr) + &p.text(Stream::Stdout))
    }

    /// Where it pins maps and links.
    pub fn pin_root(&self) -> PathBuf {
        bpffs::pin_root(&self.node.shared().id, self.node.name())
    }

    /// Its `--state-dir`.
    pub fn state_dir(&self) -> Result<PathBuf> {
        self.node.dir("agent/state")
    }

    /// Its `--run-dir`.
    pub fn run_dir(&self) -> Result<PathBuf> {
        self.node.dir("agent/run")
    }

    /// Live connections (`underpass connections`).
    pub fn connections(&self) -> Result<Value> {
        self.ask(&["connections"])
    }

    /// The agent's status (`underpass status`).
    pub fn status(&self) -> Result<Value> {
        self.ask(&["status"])
    }

    /// Its counters: `agent` and `bpf` in its status.
    pub fn counters(&self) -> Result<Value> {
        Ok(self.status()?["counters"].take())
    }

    /// Runs a command of the CLI against this agent with `-o json`.
    pub fn ask(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.binary);
        command.args(arguments).args(["-o", "json", "--run-dir"]).arg(self.run_dir()?);
        let text = Process::spawn(&mut command)?.output(CLI)?.success()?;
        serde_json::from_str(&text).with_context(|| format!("`underpass {}` printed: {text}", arguments.join(" ")))
    }

    /// Removes what the agent pinned and what it left in pods (`underpass cleanup`).
    pub fn cleanup(&self) -> Result<Output> {
        let mut command = self.node.command(&self.binary);
        command.args(["cleanup", "--force", "--pin-root"]).arg(self.pin_root());
        command.arg("--run-dir").arg(self.run_dir()?);
        for namespace in self.enrolled_in_config() {
            command.arg("--netns").arg(namespace);
        }
        Process::spawn(&mut command)?.output(CLI)
    }

    /// Network namespaces that the configuration file enrols; empty when it is not JSON.
    fn enrolled_in_config(&self) -> Vec<PathBuf> {
        let text = fs::read_to_string(&self.config).unwrap_or_default();
        let config: Value = serde_json::from_str(&text).unwrap_or_default();
        let workloads = config["workloads"].as_array().cloned().unwrap_or_default();
        workloads.iter().filter_map(|workload| workload["enroll"]["netns"].as_str()).map(PathBuf::from).collect()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.process.as_ref().is_some_and(|p| p.status().is_none()) {
            // Killed below when it does not end by itself.
            let _ = self.stop();
        }
        self.process = None;
        if self.pin_root().exists()
            && let Err(error) = self.cleanup().and_then(Output::success)
        {
            eprintln!("cleaning up after the agent of node {}: {error:#}", self.node.name());
        }
    }
}
