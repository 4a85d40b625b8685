//! One run of one machine: QEMU, its console and what its first process reports.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use vm_guest::Report;

use super::{kernels::Kernel, qemu::Qemu};

/// Memory in MiB: the initramfs twice while it is unpacked, and thousands of connections.
const MEMORY: &str = "3072";
/// Until the first test starts; idle it takes a tenth of it.
const BOOT: Duration = Duration::from_mins(3);
/// Lines of the console shown when something went wrong.
const CONSOLE_LINES: usize = 80;

/// What a machine computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Processors {
    /// Two, on threads of their own.
    Parallel,
    /// One whose clock advances by a nanosecond with every instruction, and to the next timer when there is nothing to do. What it
    /// runs takes the same time whatever else happens on the host.
    Counting,
}

/// What a machine does next, or what happens to it.
pub(super) enum Event {
    /// A line on the report channel.
    Line(String),
    /// The emulator has ended.
    End,
    /// The user wants an end.
    Interrupted,
}

/// A running machine. It is killed when it goes out of scope.
pub(super) struct Machine {
    child: Child,
    events: Receiver<Event>,
    started: Instant,
    console: std::path::PathBuf,
}

impl Machine {
    /// Starts a kernel with an initramfs; files of the run are in `directory`. Events also come from who else has `sender`.
    pub(super) fn start(
        qemu: &Qemu,
        kernel: &Kernel,
        processors: Processors,
        initramfs: &Path,
        directory: &Path,
        (sender, events): (Sender<Event>, Receiver<Event>),
    ) -> Result<Self> {
        let console = directory.join("console");
        let mut command = qemu.command();
        machine(&mut command, kernel, processors, initramfs, &console);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().context("starting QEMU through setpriv (package util-linux)")?;
        let reports = child.stdout.take().expect("piped");
        std::thread::spawn(move || {
            for line in BufReader::new(reports).split(b'\n').map_while(Result::ok) {
                if sender.send(Event::Line(String::from_utf8_lossy(&line).into_owned())).is_err() {
                    return;
                }
            }
            // Nobody may be interested any more.
            let _ = sender.send(Event::End);
        });
        Ok(Self { child, events, started: Instant::now(), console })
    }

    /// Gives `with` every report until the last one. `silence` is how long a machine that works may say nothing.
    pub(super) fn follow(&self, silence: Duration, limit: Duration, mut with: impl FnMut(Report)) -> Result<()> {
        let end = self.started + limit;
        let mut patience = BOOT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = match self.events.recv_timeout(patience.min(left)) {
                Ok(Event::Line(line)) => line,
                Ok(Event::Interrupted) => bail!("interrupted"),
                Ok(Event::End) | Err(RecvTimeoutError::Disconnected) => {
                    bail!("the machine ended before its tests did; the end of its console:\n{}", self.console()?)
                }
                Err(RecvTimeoutError::Timeout) if left <= patience => {
                    bail!("not all tests ran within {limit:?}; the end of the console:\n{}", self.console()?)
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the machine said nothing for {patience:?}; the end of its console:\n{}", self.console()?)
                }
            };
            patience = silence;
            match parse(&line) {
                Some(Report::Done) => return Ok(()),
                Some(Report::Broken { reason }) => {
                    bail!("the machine cannot go on: {reason}; the end of its console:\n{}", self.console()?)
                }
                Some(report) => with(report),
                // The firmware also writes to the serial ports.
                None => {}
            }
        }
    }

    /// Time since the start.
    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// The end of the kernel's console, indented.
    pub(super) fn console(&self) -> Result<String> {
        let text = fs::read(&self.console).with_context(|| format!("reading {}", self.console.display()))?;
        Ok(last_lines(&String::from_utf8_lossy(&text)))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It fails when the machine is off already.
        let _ = self.child.kill();
        if let Err(error) = self.child.wait() {
            eprintln!("waiting for QEMU: {error}");
        }
    }
}

fn machine(command: &mut Command, kernel: &Kernel, processors: Processors, initramfs: &Path, console: &Path) {
    // Translated code, on every processor there is; `max` has the instructions that kernel crypto wants.
    match processors {
        Processors::Parallel => command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]),
        // Without `erms` and `fsrm`, whose single instruction copies any number of bytes.
        Processors::Counting => command
            .args(["-icount", "shift=0,sleep=off", "-accel", "tcg,thread=single", "-smp", "1"])
            .args(["-cpu", "max,erms=off,fsrm=off"]),
    };
    command.args(["-m", MEMORY]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-no-reboot"]);
    command.arg("-serial").arg(format!("file:{}", console.display())).args(["-serial", "stdio"]);
    command.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs).arg("-append").arg(
        // `panic=-1` with -no-reboot: a panic ends QEMU at once. Mitigations only cost time here. `lsm` lists what Debian has
        // and BPF.
        "console=ttyS0 quiet panic=-1 oops=panic mitigations=off lsm=landlock,lockdown,yama,integrity,apparmor,bpf",
    );
}

/// A line of the channel. Whatever else is written there is no JSON object of ours.
fn parse(line: &str) -> Option<Report> {
    // A serial port sends a carriage return with every line.
    serde_json::from_str(line.trim()).ok()
}

fn last_lines(text: &str) -> String {
    let text = console::strip_ansi_codes(text);
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let from = lines.len().saturating_sub(CONSOLE_LINES);
    lines[from..].iter().fold(String::new(), |all, line| all + "    " + line + "\n")
}

#[cfg(test)]
mod tests {
    use vm_guest::Report;

    use super::{last_lines, parse};

    #[test]
    fn reports_are_told_from_noise() {
        assert_eq!(parse("{\"report\":\"started\",\"test\":3}\r"), Some(Report::Started { test: 3 }));
        let ended = "{\"report\":\"ended\",\"test\":0,\"failure\":\"exit status 101\",\"again\":true,\"seconds\":1.5,\"output\":\"a\\nb\"}";
        let expected = Report::Ended {
            test: 0,
            failure: Some("exit status 101".into()),
            again: true,
            seconds: 1.5,
            output: "a\nb".into(),
        };
        assert_eq!(parse(ended), Some(expected));
        assert_eq!(parse("SeaBIOS (version 1.16.3)"), None);
        assert_eq!(parse("{\"report\":\"sta"), None);
    }

    #[test]
    fn the_end_of_the_console_is_shown() {
        let text = (0..100).fold(String::new(), |all, line| all + &format!("line {line}\r\n"));
        let shown = last_lines(&text);
        assert!(shown.starts_with("    line 20\n") && shown.ends_with("    line 99\n"), "{shown}");
    }
}
