//! A running program with its output, killed when it goes out of scope. Limits of time are stretched by [`patience`].

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};

use crate::pace::patience;

/// Most output kept of one program, in bytes; the oldest lines go first.
const KEEP_BYTES: usize = 8 << 20;
/// Longest line; longer ones are cut in pieces.
const LINE_BYTES: u64 = 1 << 20;
/// How long output may still arrive after the program has ended (a child of it may hold the pipe open).
const DRAIN: Duration = Duration::from_secs(2);

/// Which output a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A running program. Dropping it kills it and waits for its end.
pub struct Process {
    name: String,
    pid: Pid,
    shared: Arc<Shared>,
    stdin: Option<ChildStdin>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<(Stream, String)>,
    bytes: usize,
    lines_lost: u64,
    streams_open: u8,
    status: Option<ExitStatus>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while holding it")
    }
}

impl Process {
    /// Starts `command`. Its input is a pipe, see [`close_stdin`](Self::close_stdin).
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = describe(command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let shared =
            Arc::new(Shared { state: Mutex::new(State { streams_open: 2, ..State::default() }), ..Shared::default() });
        let stdin = child.stdin.take();
        collect(&shared, Stream::Stdout, child.stdout.take().expect("piped"));
        collect(&shared, Stream::Stderr, child.stderr.take().expect("piped"));
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("process ids are positive"));
        reap(&shared, child, pid);
        Ok(Self { name, pid, shared, stdin })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().unsigned_abs()
    }

    /// Sends a signal; an error when it has already ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Under the lock: while there is no status the process is not reaped, so the id is still its own.
        let state = self.shared.lock();
        if let Some(status) = state.status {
            bail!("{} has already ended ({status}); cannot send {signal}", self.name);
        }
        kill(self.pid, signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Writes to its input.
    pub fn write_stdin(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().with_context(|| format!("input of {} is closed", self.name))?;
        stdin.write_all(bytes).and_then(|()| stdin.flush()).with_context(|| format!("writing to {}", self.name))
    }

    /// Closes its input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Its exit status, if it has ended.
    pub fn status(&self) -> Option<ExitStatus> {
        self.shared.lock().status
    }

    /// Waits for a line that contains `text`, also among those already printed.
    pub fn wait_line(&self, text: &str, within: Duration) -> Result<String> {
        let found =
            self.wait_for(within, |state| state.lines.iter().find(|(_, l)| l.contains(text)).map(|(_, l)| l.clone()));
        found.with_context(|| format!("waiting for {text:?} from {}", self.name))
    }

    /// Waits for `count` lines on standard output and returns them.
    pub fn wait_stdout(&self, count: usize, within: Duration) -> Result<Vec<String>> {
        let found = self.wait_for(within, |state| {
            let stdout =
                state.lines.iter().filter(|(stream, _)| *stream == Stream::Stdout).map(|(_, line)| line.clone());
            let lines: Vec<_> = stdout.take(count).collect();
            (lines.len() == count).then_some(lines)
        });
        found.with_context(|| format!("waiting for {count} lines from {}", self.name))
    }

    /// Waits for the first line on standard output that is JSON with the member `key`.
    pub fn wait_json(&self, key: &str, within: Duration) -> Result<serde_json::Value> {
        let found = self.wait_for(within, |state| {
            let stdout = state.lines.iter().filter(|(stream, _)| *stream == Stream::Stdout);
            stdout.filter_map(|(_, l)| serde_json::from_str::<serde_json::Value>(l).ok()).find(|v| v.get(key).is_some())
        });
        found.with_context(|| format!("waiting for a JSON line with {key:?} from {}", self.name))
    }

    /// Waits until it has printed something more than `seen` (from an earlier call, 0 at first) or has ended, at most `within`.
    pub(crate) fn wait_activity(&self, seen: &mut u64, within: Duration) {
        let count = |state: &State| state.lines.len() as u64 + state.lines_lost + u64::from(state.status.is_some());
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, within, |state| count(state) == *seen)
            .expect("nothing panics while holding it");
        *seen = count(&state);
    }

    /// Waits for its end and for what it printed last.
    pub fn wait(&self, within: Duration) -> Result<ExitStatus> {
        let status = self.wait_end(within)?;
        let state = self.shared.lock();
        // A child of it may hold the streams open for longer.
        drop(self.shared.changed.wait_timeout_while(state, patience(DRAIN), |state| state.streams_open > 0));
        Ok(status)
    }

    fn wait_end(&self, within: Duration) -> Result<ExitStatus> {
        let within = patience(within);
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, within, |state| state.status.is_none())
            .expect("nothing panics while holding it");
        state
            .status
            .with_context(|| format!("{} still runs after {within:?}; its output:\n{}", self.name, tail(&state)))
    }

    /// Closes its input, waits for its end and for all its output. A program that takes longer is killed, and that is an error.
    pub fn output(mut self, within: Duration) -> Result<Output> {
        self.close_stdin();
        let status = self.wait(within)?;
        let (stdout, stderr) = (self.text(Stream::Stdout), self.text(Stream::Stderr));
        Ok(Output { name: self.name.clone(), status, stdout, stderr })
    }

    /// What it has printed so far.
    pub fn text(&self, stream: Stream) -> String {
        let state = self.shared.lock();
        let lines = state.lines.iter().filter(|(from, _)| *from == stream);
        lines.fold(String::new(), |all, (_, line)| all + line + "\n")
    }

    /// Kills it and waits for its end.
    pub fn kill(&self) -> Result<ExitStatus> {
        // It may end by itself in between.
        let _ = self.signal(Signal::SIGKILL);
        self.wait_end(Duration::from_secs(10))
    }

    fn wait_for<T>(&self, within: Duration, mut find: impl FnMut(&State) -> Option<T>) -> Result<T> {
        let (within, drain) = (patience(within), patience(DRAIN));
        let deadline = Instant::now() + within;
        let mut ended_at = None;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = find(&state) {
                return Ok(found);
            }
            let now = Instant::now();
            if let Some(status) = state.status {
                let drained = state.streams_open == 0 || now >= *ended_at.get_or_insert(now) + drain;
                ensure!(!drained, "it has ended ({status}); its output:\n{}", tail(&state));
            }
            ensure!(now < deadline, "not within {within:?}; its output:\n{}", tail(&state));
            let until = ended_at.map_or(deadline, |ended| deadline.min(ended + drain));
            let waited = self.shared.changed.wait_timeout(state, until.saturating_duration_since(now));
            state = waited.expect("nothing panics while holding it").0;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stdin = None;
        if self.status().is_none()
            && let Err(error) = self.kill()
        {
            eprintln!("{error:#}");
        }
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Output {
    name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Its standard output, or an error with everything it said when it failed.
    pub fn success(self) -> Result<String> {
        ensure!(self.status.success(), "{} failed ({}):\n{}{}", self.name, self.status, self.stdout, self.stderr);
        Ok(self.stdout)
    }

    /// The last line of its standard output as JSON, whatever its exit status.
    pub fn last_json(&self) -> Result<serde_json::Value> {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| {
            format!("{} ({}) printed no JSON line:\n{}{}", self.name, self.status, self.stdout, self.stderr)
        })
    }
}

/// Reads lines on a thread of its own until the end of the stream.
fn collect(shared: &Arc<Shared>, stream: Stream, pipe: impl Read + Send + 'static) {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        loop {
            let mut line = Vec::new();
            match reader.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            let line = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            let mut state = shared.lock();
            state.bytes += line.len();
            state.lines.push_back((stream, line));
            while state.bytes > KEEP_BYTES && state.lines.len() > 1 {
                let (_, lost) = state.lines.pop_front().expect("more than one line");
                state.bytes -= lost.len();
                state.lines_lost += 1;
            }
            drop(state);
            shared.changed.notify_all();
        }
        shared.lock().streams_open -= 1;
        shared.changed.notify_all();
    });
}

/// Waits for the end on a thread of its own, leaving the process unreaped until the lock is held.
fn reap(shared: &Arc<Shared>, mut child: Child, pid: Pid) {
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
        let mut state = shared.lock();
        state.status = child.wait().ok();
        drop(state);
        shared.changed.notify_all();
    });
}

/// The command as a person would type it, without the wrapper that enters the pod.
fn describe(command: &Command) -> String {
    let words: Vec<_> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|w| w.to_string_lossy()).collect();
    let inner = words.iter().position(|w| w == "--").filter(|_| words.iter().any(|w| w == "nsenter"));
    let place = words.iter().find_map(|w| w.strip_prefix("--net=")).and_then(|p| p.rsplit('/').next());
    let shown = words[inner.map_or(0, |i| i + 1)..].join(" ");
    place.map_or_else(|| format!("`{shown}`"), |place| format!("`{shown}` in {place}"))
}

fn tail(state: &State) -> String {
    let from = state.lines.len().saturating_sub(40);
    state.lines.iter().skip(from).fold(String::new(), |all, (_, line)| all + "    " + line + "\n")
}
