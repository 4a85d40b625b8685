//! Programs that go on when the command that started them has ended.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    cgroups,
    place::Place,
    record::{Record, Running},
};

/// How often something is asked that does not tell by itself.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// Lines of a log that are shown when its program fails.
const SHOWN: usize = 20;

/// Held while something is made, so that an interruption finds it recorded.
static MAKING: Mutex<()> = Mutex::new(());

/// Nothing is made while this is held.
pub(super) fn making() -> MutexGuard<'static, ()> {
    MAKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A playground that is being made.
pub(super) struct Stage<'a> {
    pub(super) place: &'a Place,
    /// Directory with the programs of Kubernetes.
    pub(super) parts: &'a Path,
    pub(super) record: Record,
}

/// Where a program runs.
#[derive(Clone, Copy)]
pub(super) enum Inside<'a> {
    /// The machine itself.
    Machine,
    /// A network namespace.
    Network(&'a str),
    /// A node without mounts of its own yet.
    NewNode(&'a str),
    /// A node, with the mounts of this process.
    Node(&'a str, i32),
}

impl Stage<'_> {
    /// The path of one of the programs.
    pub(super) fn part(&self, name: &str) -> PathBuf {
        self.parts.join("bin").join(name)
    }

    /// Starts a program in a session and the control group of the playground's, and records it. It logs to `logs/NAME.log`.
    pub(super) fn start(&mut self, name: &str, inside: Inside<'_>, program: &[&str]) -> Result<i32> {
        let mut command = self.detached(inside, program)?;
        let log = self.log(name)?;
        command.stdout(log.try_clone().context("sharing a log")?).stderr(log);
        Ok(self.spawn(name, &mut command)?.id().cast_signed())
    }

    /// The same; what it prints is the caller's, and its errors go to the log.
    pub(super) fn start_piped(&mut self, name: &str, inside: Inside<'_>, program: &[&str]) -> Result<Child> {
        let mut command = self.detached(inside, program)?;
        command.stdout(Stdio::piped()).stderr(self.log(name)?);
        self.spawn(name, &mut command)
    }

    fn spawn(&mut self, name: &str, command: &mut Command) -> Result<Child> {
        let _making = making();
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("starting {name}"))?;
        self.record.processes.push(Running::new(name, child.id().cast_signed())?);
        self.record.write(self.place)?;
        Ok(child)
    }

    /// A command whose process becomes the program itself: everything on the way replaces itself by the next.
    fn detached(&self, inside: Inside<'_>, program: &[&str]) -> Result<Command> {
        let mut command = Command::new("sh");
        let node = match inside {
            Inside::Machine | Inside::Network(_) => None,
            Inside::NewNode(node) | Inside::Node(node, _) => Some(node),
        };
        command.args(["-c", r#"echo $$ > "$0" && exec setsid "$@""#]).arg(cgroups::entrance(self.place, node)?);
        command.args(self.enter(inside)).args(program);
        self.environment(&mut command);
        Ok(command)
    }

    /// A short program in the same place; its output, when it succeeds.
    pub(super) fn output(&self, inside: Inside<'_>, program: &[&str]) -> Result<String> {
        let words: Vec<_> =
            self.enter(inside).into_iter().chain(program.iter().map(|word| (*word).to_owned())).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        self.environment(&mut command);
        crate::exec::output(&mut command)
    }

    /// What goes before a program so that it runs there.
    pub(super) fn enter(&self, inside: Inside<'_>) -> Vec<String> {
        let network = |name: &str| format!("--net=/run/netns/{name}");
        match inside {
            Inside::Machine => vec!["env".into()],
            Inside::Network(name) => vec!["nsenter".into(), network(name), "--".into()],
            Inside::NewNode(node) => vec!["nsenter".into(), network(&self.place.namespace(node)), "--".into()],
            Inside::Node(node, pid) => {
                let mounts = format!("--mount=/proc/{pid}/ns/mnt");
                vec!["nsenter".into(), mounts, network(&self.place.namespace(node)), "--".into()]
            }
        }
    }

    /// The programs find each other and their libraries.
    pub(super) fn environment(&self, command: &mut Command) {
        let path = std::env::var("PATH").unwrap_or_default();
        let bin = self.place.file("bin");
        command.env("PATH", format!("{}:{}:{path}:/usr/sbin:/sbin", bin.display(), self.parts.join("bin").display()));
        command
            .env("LD_LIBRARY_PATH", self.parts.join("lib"))
            .env("XTABLES_LIBDIR", self.parts.join("xtables/modules"));
        command.env_remove("KUBECONFIG").current_dir("/");
    }

    fn log(&self, name: &str) -> Result<File> {
        let path = self.place.logs().join(format!("{name}.log"));
        // Appended to: it may be cut while the program writes.
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        file.with_context(|| format!("opening {}", path.display()))
    }

    /// Asks until the answer is something. It is an error when a program ends meanwhile.
    pub(super) fn wait<T>(
        &self,
        what: &str,
        within: Duration,
        mut ask: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + within;
        loop {
            let last = match ask() {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => String::new(),
                Err(error) => format!("; the last answer: {error:#}"),
            };
            let ended = self.record.ended();
            if let Some(first) = ended.first() {
                bail!("{first} has ended while waiting for {what}:\n{}", self.tail(first));
            }
            ensure!(Instant::now() < deadline, "{what} did not happen within {within:?}{last}");
            std::thread::sleep(ASK_AGAIN);
        }
    }

    fn tail(&self, name: &str) -> String {
        let path = self.place.logs().join(format!("{name}.log"));
        let bytes = fs::read(&path).unwrap_or_default();
        last_lines(&String::from_utf8_lossy(&bytes))
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::{SHOWN, last_lines};

    #[test]
    fn the_end_of_a_log() {
        let text = (0..100).map(|line| line.to_string()).collect::<Vec<_>>().join("\n");
        let shown = last_lines(&text);
        assert_eq!((shown.lines().count(), shown.lines().last()), (SHOWN, Some("99")));
        assert_eq!(last_lines("one"), "one");
    }
}
