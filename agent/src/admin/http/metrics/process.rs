//! The agent's process, under the names that Prometheus' client libraries share.

use std::fmt;

use procfs::process::{LimitValue, Process, Stat};
use prometheus_client::encoding::DescriptorEncoder;

use super::encode::{NONE, counter, gauge};

/// A file of `/proc` that cannot be read leaves its metric out.
pub(super) fn encode(to: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let Ok(process) = Process::myself() else { return Ok(()) };
    if let Ok(stat) = process.stat() {
        gauge(to, "process_resident_memory_bytes", "Resident memory", [(NONE, stat.rss * procfs::page_size())])?;
        counter(to, "process_cpu_seconds", "Processor time, user and system", [(NONE, cpu_seconds(&stat))])?;
        gauge(to, "process_threads", "Threads", [(NONE, stat.num_threads)])?;
    }
    if let Ok(open) = process.fd_count() {
        gauge(to, "process_open_fds", "Open descriptors", [(NONE, open)])?;
    }
    if let Ok(limits) = process.limits()
        && let LimitValue::Value(most) = limits.max_open_files.soft_limit
    {
        gauge(to, "process_max_fds", "Most descriptors", [(NONE, most)])?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "ticks of a process fit for thousands of years")]
fn cpu_seconds(stat: &Stat) -> f64 {
    (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64
}
