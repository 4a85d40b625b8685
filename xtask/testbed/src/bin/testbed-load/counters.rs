//! What the kernel counts: processors' time, of the machine and of cgroups, and context switches.

use std::{collections::BTreeMap, fs, path::PathBuf, str::FromStr};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// A group of cgroups whose processor time is wanted: `NAME=DIRECTORY`.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    name: String,
    /// The file `cpu.stat` of a cgroup.
    file: PathBuf,
}

impl FromStr for Group {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, directory) = text.split_once('=').ok_or("write NAME=DIRECTORY, the directory of a cgroup v2")?;
        let file = PathBuf::from(directory).join("cpu.stat");
        if !file.is_file() {
            return Err(format!("{} does not exist: {directory} is no cgroup v2", file.display()));
        }
        Ok(Self { name: name.to_owned(), file })
    }
}

/// Totals since the machine's start. Times in seconds, summed over processors.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counters {
    pub(crate) busy: f64,
    pub(crate) idle: f64,
    pub(crate) context_switches: u64,
    /// By the groups' names; cgroups of one name are added up.
    pub(crate) groups: BTreeMap<String, f64>,
}

impl Counters {
    pub(crate) fn read(groups: &[Group]) -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the system has no clock tick")? as f64;
        let mut counters = Self::of_stat(&text, ticks).context("/proc/stat has no line `cpu` or `ctxt`")?;
        // In nanoseconds, where root may see it; the above has hundredths of a second.
        let timers = fs::read_to_string("/proc/timer_list").unwrap_or_default();
        counters.idle = idle_of_timers(&timers).unwrap_or(counters.idle);
        for group in groups {
            let text = fs::read_to_string(&group.file).with_context(|| format!("reading {}", group.file.display()))?;
            let usage = usage(&text).with_context(|| format!("{} has no usage_usec", group.file.display()))?;
            *counters.groups.entry(group.name.clone()).or_default() += usage;
        }
        Ok(counters)
    }

    /// `proc_stat(5)`: user, nice, system, idle, iowait, irq, softirq, steal. What a hypervisor stole is neither busy nor idle.
    fn of_stat(text: &str, ticks: f64) -> Option<Self> {
        let line = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
        let times: Vec<f64> =
            line("cpu ")?.split_whitespace().map(|time| time.parse::<f64>().ok()).collect::<Option<_>>()?;
        let [user, nice, system, idle, iowait, irq, softirq, ..] = times[..] else { return None };
        Some(Self {
            busy: (user + nice + system + irq + softirq) / ticks,
            idle: (idle + iowait) / ticks,
            context_switches: line("ctxt ")?.trim().parse().ok()?,
            groups: BTreeMap::new(),
        })
    }

    /// What was added since `earlier`.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let groups = self.groups.iter().map(|(name, time)| {
            let before = earlier.groups.get(name).copied().unwrap_or_default();
            (name.clone(), time - before)
        });
        Self {
            busy: self.busy - earlier.busy,
            idle: self.idle - earlier.idle,
            context_switches: self.context_switches - earlier.context_switches,
            groups: groups.collect(),
        }
    }
}

/// Seconds without work, added up over processors: lines `.idle_sleeptime : 123 nsecs`.
fn idle_of_timers(text: &str) -> Option<f64> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix(".idle_sleeptime"));
    let times = lines.map(|line| line.trim_start_matches([' ', ':']).split(' ').next()?.parse::<u64>().ok());
    let all: Vec<u64> = times.collect::<Option<_>>()?;
    (!all.is_empty()).then(|| all.iter().sum::<u64>() as f64 / 1e9)
}

/// Seconds in a cgroup's `cpu.stat`.
fn usage(text: &str) -> Option<f64> {
    let micros: u64 = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?.trim().parse().ok()?;
    Some(micros as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::{Counters, idle_of_timers, usage};

    #[test]
    fn the_kernels_formats() {
        let text = "cpu  100 20 300 4000 50 6 7 8 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\nintr 5\nctxt 12345\nbtime 1\n";
        let counters = Counters::of_stat(text, 100.0).unwrap();
        assert_eq!((counters.busy, counters.idle, counters.context_switches), (4.33, 40.5, 12345));
        assert!(Counters::of_stat("cpu  1 2\nctxt 1\n", 100.0).is_none());
        let timers =
            "  .tick_stopped   : 0\n  .idle_sleeptime : 1500000000 nsecs\n  .idle_sleeptime : 500000000 nsecs\n";
        assert_eq!((idle_of_timers(timers), idle_of_timers("")), (Some(2.0), None));
        assert_eq!(usage("usage_usec 1500000\nuser_usec 1\n"), Some(1.5));
        assert_eq!(usage("user_usec 1\n"), None);
    }
}
