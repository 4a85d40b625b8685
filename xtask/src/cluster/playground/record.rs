//! What a playground consists of, on disk, so that another process can look after it and remove it.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::place::Place;

const FILE: &str = "record.json";

/// Written again whenever something is added.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// `up` has come to its end.
    pub(super) complete: bool,
    pub(super) processes: Vec<Running>,
    /// Directories of the machine's that were made to mount something on, outer ones first.
    pub(super) mount_points: Vec<PathBuf>,
}

/// A process, which is not mistaken for a later one with the same number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Running {
    pub(super) name: String,
    pub(super) pid: i32,
    /// Clock ticks after the machine's start (proc(5): `starttime`).
    started: u64,
    /// Which start of the machine.
    boot: String,
}

impl Record {
    /// The record of `place`; none: nothing was ever made.
    pub(super) fn read(place: &Place) -> Result<Option<Self>> {
        let path = place.file(FILE);
        match fs::read_to_string(&path) {
            Ok(text) => {
                let remedy = || format!("reading {}: {} removes the playground", path.display(), place.command("down"));
                serde_json::from_str(&text).map(Some).with_context(remedy)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    pub(super) fn write(&self, place: &Place) -> Result<()> {
        let (path, new) = (place.file(FILE), place.file("record.new"));
        fs::write(&new, serde_json::to_string_pretty(self).context("writing the record")?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("writing {}", path.display()))
    }

    /// An error when a program of it has ended, or was never started.
    pub(super) fn ensure_whole(&self, place: &Place) -> Result<()> {
        let (ended, remedy) = (self.ended(), place.command("down"));
        ensure!(ended.is_empty(), "the playground is not whole, {} ended: {remedy} first", ended.join(", "));
        ensure!(self.complete, "an earlier command for the playground was not finished: {remedy} first");
        Ok(())
    }

    /// The process of a program.
    pub(super) fn process(&self, name: &str) -> Result<&Running> {
        self.processes.iter().find(|process| process.name == name).with_context(|| format!("there is no {name}"))
    }

    /// Names of programs that do not run any more.
    pub(super) fn ended(&self) -> Vec<&str> {
        self.processes.iter().filter(|process| !process.is_alive()).map(|process| process.name.as_str()).collect()
    }
}

impl Running {
    /// The process `pid`, which has just been started.
    pub(super) fn new(name: &str, pid: i32) -> Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("looking at {name}"))?;
        let (_, started) = state_and_start(&stat).with_context(|| format!("reading /proc/{pid}/stat"))?;
        Ok(Self { name: name.to_owned(), pid, started, boot: boot()? })
    }

    pub(super) fn is_alive(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let alive = state_and_start(&stat).is_some_and(|(state, start)| start == self.started && !"ZX".contains(state));
        alive && boot().is_ok_and(|boot| boot == self.boot)
    }

    /// Kills it, if it is still the same.
    pub(super) fn kill(&self) {
        if self.is_alive() {
            // It may end at this very moment.
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

fn boot() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path).with_context(|| format!("reading {path}"))?.trim().to_owned())
}

/// Fields 3 and 22 of proc(5)'s `stat`. The second field, a name, may have spaces and parentheses in it.
fn state_and_start(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{Record, Running, state_and_start};

    #[test]
    fn names_with_parentheses() {
        let stat = "7 (a) S (b) R 1 7 7 0 -1 4194560 100 0 0 0 1 2 0 0 20 0 9 0 4711 1000 10 18446744073709551615";
        assert_eq!(state_and_start(stat), Some(('R', 4711)));
        assert_eq!(state_and_start("7 (a) R 1"), None);
        assert_eq!(state_and_start(""), None);
    }

    #[test]
    fn a_later_process_with_the_same_number_is_another() {
        let this = Running::new("this", i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(this.is_alive());
        let earlier = Running { started: this.started + 1, name: "earlier".into(), ..this.clone() };
        let before = Running { boot: "another".into(), name: "before".into(), ..this.clone() };
        let record = Record { processes: vec![this, earlier, before], ..Record::default() };
        assert_eq!(record.ended(), ["earlier", "before"]);
    }
}
