//! A named network namespace, as iproute2 keeps them.

use std::{
    fs::File,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

use crate::state::Shared;

/// Where iproute2 mounts named namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// A named network namespace. Removed with its testbed.
#[derive(Debug, Clone)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Creates the namespace `name`, registers it with `shared`, brings `lo` up and turns off waiting for duplicate address detection.
    pub(crate) fn create(shared: &Shared, name: String) -> Result<Self> {
        shared.exclusively(|| {
            run_ip(&["netns", "add", &name], "")?;
            Ok(())
        })?;
        let namespace = Self { name };
        namespace.sysctl(&[
            ("net.ipv6.conf.all.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_ra", "0"),
        ])?;
        namespace.ip("link set lo up\n")?;
        Ok(namespace)
    }

    /// The namespace `name`, which somebody else made and removes.
    pub fn existing(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    /// Its name for iproute2.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path, e.g. for `nsenter --net=`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NETNS_DIR).join(&self.name)
    }

    /// Runs iproute2 batch lines inside; stops at the first that fails.
    pub fn ip(&self, batch: &str) -> Result<String> {
        run_ip(&["-n", &self.name, "-batch", "-"], batch).with_context(|| format!("in namespace {}", self.name))
    }

    /// Writes kernel parameters, e.g. `("net.ipv4.ip_forward", "1")`.
    pub fn sysctl(&self, parameters: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (name, value) in parameters {
                let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
                std::fs::write(&path, value).with_context(|| format!("setting {name}={value} ({})", path.display()))?;
            }
            Ok(())
        })?
    }

    /// Runs `f` on a new thread that is inside the namespace. The thread's cgroup is the caller's.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.path();
        let file = File::open(&path).with_context(|| format!("opening network namespace {}", path.display()))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || setns(&file, CloneFlags::CLONE_NEWNET).map(|()| f()));
            match thread.join() {
                Ok(result) => {
                    result.with_context(|| format!("entering network namespace {}; are you root?", path.display()))
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

/// Removes the namespace `name` and with it its interfaces, routes and rules.
pub(crate) fn delete(name: &str) -> Result<()> {
    run_ip(&["netns", "del", name], "").map(drop)
}

/// Runs `ip` with `stdin`; its output, or an error with its message.
fn run_ip(arguments: &[&str], stdin: &str) -> Result<String> {
    let mut child = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running `ip`; install iproute2")?;
    // A failing `ip` may close its end early: the exit status below says more than the broken pipe.
    let _ = child.stdin.take().expect("stdin is piped").write_all(stdin.as_bytes());
    let output = child.wait_with_output().context("waiting for `ip`")?;
    ensure!(
        output.status.success(),
        "`ip {}` failed ({}): {}{}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim(),
        stdin.lines().fold(String::new(), |all, line| all + "\n    " + line),
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
