//! `underpass top` in a terminal, which tmux is.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use testbed::{Process, underpass_path};

use super::{SOON, json};
use crate::world::{World, at, eventually, serve};

/// A terminal with one program in it, and behind its end a line that tells the exit code.
struct Terminal {
    socket: PathBuf,
}

impl Terminal {
    /// Starts `underpass top` for the agent with this run directory, behind a line that was there before.
    fn top(dir: &Path, run_dir: &Path) -> Result<Self> {
        // Each its own: the server of the last one may still be ending.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let terminal = Self { socket: dir.join(format!("tmux-{}", NEXT.fetch_add(1, Relaxed))) };
        let top = format!(
            "echo before; {} top --interval 200ms --run-dir {}; echo \"ended with $?\"; exec cat",
            underpass_path()?.display(),
            run_dir.display()
        );
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", "170", "-y", "30", &top])?;
        Ok(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(&self.socket).args(arguments).env_remove("TMUX").env("LC_ALL", "C.UTF-8");
        Process::spawn(&mut command)?.output(SOON)?.success()
    }

    fn screen(&self) -> Result<String> {
        self.tmux(&["capture-pane", "-p"])
    }

    fn value(&self, format: &str) -> Result<String> {
        Ok(self.tmux(&["display-message", "-p", format])?.trim().to_owned())
    }

    fn wait(&self, part: &str) -> Result<String> {
        let mut last = String::new();
        eventually(SOON, || {
            last = self.screen()?;
            ensure!(last.contains(part), "no {part:?} on the screen:\n{last}");
            Ok(())
        })?;
        Ok(last)
    }

    fn keys(&self, keys: &[&str]) -> Result<()> {
        self.tmux(&[&["send-keys"], keys].concat()).map(drop)
    }

    /// Waits for the program's end with this exit code; what is on the screen then.
    fn ended(&self, code: u8) -> Result<String> {
        let screen = self.wait("ended with ")?;
        ensure!(screen.contains(&format!("ended with {code}\n")), "{screen}");
        Ok(screen)
    }

    /// The program, which is the shell's only child.
    fn pid(&self) -> Result<Pid> {
        let shell = self.value("#{pane_pid}")?;
        let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"))?;
        Ok(Pid::from_raw(children.trim().parse().with_context(|| format!("one child, not {children:?}"))?))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Err(error) = self.tmux(&["kill-server"]) {
            eprintln!("{error:#}");
        }
    }
}

#[test]
fn it_shows_what_is_live_and_gives_the_terminal_back() -> Result<()> {
    let mut world = World::new("top")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let held = world.client.app(&["expect-reset", &at(world.server.ipv4(), 8080)])?;
    held.wait_json("established", Duration::from_secs(10))?;

    let terminal = Terminal::top(world.bed.dir(), &world.a.run_dir()?)?;
    let screen = terminal.wait("1 connections")?;
    for part in [
        "underpass top  node a, cluster.local",
        "1 of 1 pods enrolled",
        "default/client",
        "ns/default/sa/client",
        "ns/default/sa/server",
        &at(world.server.ipv4(), 8080),
        "order: rate",
    ] {
        ensure!(screen.contains(part), "{part} in\n{screen}");
    }
    terminal.keys(&["s"])?;
    terminal.wait("order: bytes")?;
    terminal.keys(&["Tab"])?;
    let screen = terminal.wait("CLIENT IDENTITY")?;
    ensure!(screen.contains("spiffe://cluster.local/ns/default/sa/client"), "{screen}");
    terminal.keys(&["p"])?;
    terminal.wait("paused")?;
    terminal.keys(&["p", "Tab"])?;

    // The picture follows connections and the agent's end, and comes back with it.
    drop(held);
    terminal.wait("0 connections")?;
    world.a.kill()?;
    terminal.wait("NO ANSWER: no agent is running")?;
    world.a.restart()?;
    terminal.wait("1 of 1 pods enrolled")?;

    ensure!(terminal.value("#{alternate_on}")? == "1");
    terminal.keys(&["q"])?;
    let screen = terminal.ended(0)?;
    ensure!(
        screen.starts_with("before\nended") && !screen.contains("underpass top"),
        "the screen is not back:\n{screen}"
    );
    drop(terminal);

    let terminal = Terminal::top(world.bed.dir(), &world.a.run_dir()?)?;
    terminal.wait("underpass top")?;
    kill(terminal.pid()?, Signal::SIGTERM)?;
    terminal.ended(0)?;
    ensure!(terminal.value("#{alternate_on}")? == "0", "{}", terminal.screen()?);
    drop(terminal);

    world.a.kill()?;
    let terminal = Terminal::top(world.bed.dir(), &world.a.run_dir()?)?;
    let screen = terminal.ended(3)?;
    ensure!(screen.starts_with("before\nerror: no agent is running"), "{screen}");
    Ok(())
}

/// An agent whose every name tries to take over the terminal.
#[test]
fn hostile_names_do_nothing_to_a_terminal() -> Result<()> {
    const HOSTILE: &str = "x\x1b]2;stolen\x07\x1b[2J\u{9b}31m\r\nforged";
    let world = World::new("hostile")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let held = world.client.app(&["expect-reset", &at(world.server.ipv4(), 8080)])?;
    held.wait_json("established", Duration::from_secs(10))?;
    let mut status = json(&world.a, &["status"])?;
    let mut connections = json(&world.a, &["connections"])?;
    for name in [HOSTILE.to_owned(), HOSTILE.repeat(2000)] {
        for field in ["node", "version", "trust_domain"] {
            status[field] = name.as_str().into();
        }
        for field in ["workload", "service", "source_identity", "destination_identity", "cipher"] {
            connections["connections"][0][field] = name.as_str().into();
        }
        let dir = world.bed.dir().join(format!("fake-{}", name.len()));
        std::fs::create_dir(&dir)?;
        let listener = UnixListener::bind(dir.join("admin.sock"))?;
        let (status, connections) = (status.clone(), connections.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that went away is none of this test's business.
                let _ = answer(stream, &status, &connections);
            }
        });
        let terminal = Terminal::top(&dir, &dir)?;
        let screen = terminal.wait("1 connections")?;
        ensure!(screen.contains("\\u{1b}]2;stolen"), "the name is not shown:\n{screen}");
        ensure!(screen.lines().all(|l| !l.starts_with("forged")), "a line was forged:\n{screen}");
        ensure!(terminal.value("#{pane_title}")? != "stolen", "the title was changed");
        terminal.keys(&["Tab"])?;
        terminal.wait("CLIENT IDENTITY")?;
        terminal.keys(&["Escape"])?;
        terminal.ended(0)?;
        // The same for those that print.
        for verb in ["status", "connections"] {
            let out =
                Process::spawn(Command::new(underpass_path()?).arg(verb).arg("--run-dir").arg(&dir))?.output(SOON)?;
            let text = out.success()?;
            ensure!(text.contains("\\u{1b}]2;stolen"), "{text}");
            ensure!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
            ensure!(text.len() < 100_000, "{verb} printed {} bytes", text.len());
        }
    }
    Ok(())
}

/// As the agent's socket does: one request, one JSON body.
fn answer(stream: UnixStream, status: &Value, connections: &Value) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).context("a request line")?;
    let body = match path.split('?').next() {
        Some("/v1/status") => status,
        Some("/v1/counters") => &status["counters"],
        _ => connections,
    };
    let body = body.to_string();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    let mut stream = reader.into_inner();
    stream.write_all(head.as_bytes())?;
    Ok(stream.write_all(body.as_bytes())?)
}
