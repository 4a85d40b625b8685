//! What connections cost on which nothing happens: memory of the processes that carry them, and of the kernel.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use testbed::{Process, pace};

use super::{
    case::Case,
    lane::{Lane, Tools},
    row::Row,
};
use crate::ui::Step;

/// Connections wanted.
const WANTED: u64 = 10_000;
/// Descriptors of a process that are for something else.
const RESERVED: u64 = 2000;
/// How long opening them all may take.
const OPEN: Duration = Duration::from_mins(2);
/// After the end of the connections, until memory is looked at again.
const AFTER: Duration = Duration::from_secs(10);

/// What one lane has shown so far.
struct Held<'a> {
    lane: &'a Lane,
    before: f64,
    during: f64,
    kernel: f64,
    closed: Instant,
}

/// As many as were asked for or as a proxy has descriptors for: two for each connection.
fn connections(tools: &Tools, quick: bool) -> u64 {
    let wanted = if quick { WANTED / 5 } else { WANTED };
    wanted.min(tools.descriptors.saturating_sub(RESERVED) / 2)
}

/// Three rows for each lane that the case is for.
pub(super) fn measure(case: &Case, lanes: &[Lane], tools: &Tools, quick: bool, step: &Step) -> Result<Vec<Row>> {
    let count = connections(tools, quick);
    ensure!(
        count > 0,
        "a process may open {} files only, too few for idle connections: raise `ulimit -n`",
        tools.descriptors
    );
    let mut all = Vec::new();
    for lane in lanes.iter().filter(|lane| lane.is_for(case)) {
        step.now(format!("{count} idle connections, {}", lane.system.name));
        all.push(hold(lane, case, count).with_context(|| format!("idle connections of {}", lane.system.name))?);
    }
    let plain_kernel = all.iter().find(|held| held.lane.system.name == "plain").map(|held| held.kernel);
    let mut rows = Vec::new();
    step.now("what is left of them");
    for held in &all {
        // Memory is given back by timers, which nobody reports.
        std::thread::sleep((held.closed + AFTER).saturating_duration_since(Instant::now()));
        let after = anonymous(held.lane)?;
        let name = &held.lane.system.name;
        // A proxy on each side, and each has every connection.
        let each = |bytes: f64| bytes / count as f64 / 2.0;
        let unit = |what: &str| format!("B/connection, {what}, {count} held");
        if held.lane.system.is_proxy() {
            rows.push(Row::single(
                "idle10k",
                name,
                each(held.during - held.before),
                &unit("each side's anonymous memory"),
                None,
            ));
            let left = each(after - held.before);
            rows.push(Row::single("idle10k-after", name, left, &unit("as before, 10 s after their end"), None));
        }
        let kernel = held.kernel / count as f64;
        let ratio = plain_kernel.map(|plain| held.kernel / plain);
        rows.push(Row::single("idle10k-kernel", name, kernel, &unit("kernel slab of the machine"), ratio));
    }
    Ok(rows)
}

fn hold<'a>(lane: &'a Lane, case: &Case, count: u64) -> Result<Held<'a>> {
    shrink_slabs();
    let (before, slab_before) = (anonymous(lane)?, slab()?);
    let mut load = lane.load("hold", case.way);
    let holding = Process::spawn(load.args(["--connections", &count.to_string()]))?;
    holding.wait_json("held", OPEN)?;
    let (during, slab_during) = (anonymous(lane)?, slab()?);
    holding.output(pace::patience(Duration::from_secs(30)))?.success()?;
    Ok(Held { lane, before, during, kernel: slab_during - slab_before, closed: Instant::now() })
}

/// Bytes of anonymous memory of all processes that carry connections.
fn anonymous(lane: &Lane) -> Result<f64> {
    let mut sum = 0.0;
    for process in lane.carriers()? {
        let file = format!("/proc/{process}/smaps_rollup");
        let text = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
        sum += kilobytes(&text, "Anonymous:").with_context(|| format!("{file} has no line Anonymous"))?;
    }
    Ok(sum)
}

/// Bytes in the kernel's slab caches.
fn slab() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    kilobytes(&text, "Slab:").context("/proc/meminfo has no line Slab")
}

/// Bytes in a line `NAME: 123 kB`.
fn kilobytes(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
}

/// Empty slabs of earlier connections would take in those of the next ones, and nothing would seem to grow. Where the kernel does not offer it,
/// numbers of later systems are too small; plain TCP is the first.
fn shrink_slabs() {
    let caches = fs::read_dir(Path::new("/sys/kernel/slab")).into_iter().flatten().flatten();
    for cache in caches {
        // Some caches cannot be shrunk.
        let _ = fs::write(cache.path().join("shrink"), "1");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn kilobytes() {
        let text = "Slab:             130400 kB\nSReclaimable:   1 kB\nHugePages_Total:       0\n";
        assert_eq!(super::kilobytes(text, "Slab:"), Some(130_400.0 * 1024.0));
        assert_eq!(super::kilobytes(text, "HugePages_Total:"), None);
        assert_eq!(super::kilobytes(text, "Absent:"), None);
    }
}
