//! The pinned links and the programs that they run.

use std::{collections::BTreeMap, os::fd::AsFd as _, path::Path, time::SystemTime};

use aya::programs::{ProgramInfo, loaded_programs};
use serde::Serialize;

use super::{layouts, version};
use crate::{
    capture::{
        CaptureError,
        loader::HOOKS,
        pins::{self, Layout, TcPin},
    },
    sys::bpf::{self, LinkTarget},
};

/// Every pinned link.
#[derive(Debug, Clone, Serialize)]
pub struct Programs {
    /// Where was looked.
    pub pin_root: String,
    /// By version, this program's own first; cgroup hooks before tc programs.
    pub programs: Vec<ProgramRow>,
}

/// One pinned link, and the program that runs there.
#[derive(Debug, Clone, Serialize)]
pub struct ProgramRow {
    /// Where it runs: `connect4`, ..., `sockops`, `ingress`, `egress`; `node` is the guard on the
    /// node's side of a pod's interface.
    pub hook: String,
    /// The pod's number, for tc programs.
    pub pod_id: Option<u32>,
    /// What it is attached to.
    pub attached: Attached,
    /// ABI hash of the version that pinned it.
    pub version: String,
    /// Whether that is this program's version.
    pub own: bool,
    /// The kernel's number of the link.
    pub link_id: Option<u32>,
    /// The kernel's number of the program.
    pub program_id: Option<u32>,
    /// The program's name.
    pub program: Option<String>,
    /// The kernel's hash of the program's instructions, hexadecimal.
    pub tag: Option<String>,
    /// When it was loaded, RFC 3339, UTC.
    pub loaded_at: Option<String>,
    /// How often it ran; only counted while `kernel.bpf_stats_enabled` is 1.
    pub runs: Option<u64>,
    /// How long it ran in all, in nanoseconds; as above.
    pub run_time_ns: Option<u64>,
    /// Why it is not as it should be.
    pub problem: Option<String>,
}

/// What a link is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Attached {
    /// A cgroup, by the inode number of its directory.
    Cgroup(u64),
    /// A network interface, by its index: of the pod, or of the node where the hook is `node`.
    Interface(u32),
    /// What it was attached to is gone.
    Gone,
    /// Not known.
    Unknown,
}

/// What is pinned under `pin_root`. A link that cannot be opened has a problem; so has a cgroup hook that is missing.
pub fn programs(pin_root: &Path) -> Result<Programs, CaptureError> {
    let loaded: BTreeMap<u32, ProgramInfo> = loaded_programs().filter_map(Result::ok).map(|p| (p.id(), p)).collect();
    let mut rows = Vec::new();
    for (layout, own) in layouts(pin_root)? {
        let pinned = pins::list(&layout.links())?;
        let mut names: Vec<String> =
            pinned.iter().filter_map(|p| Some(p.file_name()?.to_string_lossy().into_owned())).collect();
        let hooks = HOOKS.iter().map(|(hook, _)| *hook);
        let missing: Vec<_> = hooks.filter(|h| own && !names.iter().any(|n| n == h)).map(str::to_owned).collect();
        names.extend(missing);
        names.sort_by_key(|name| order(name));
        rows.extend(names.iter().map(|name| row(&layout, own, name, &loaded)));
    }
    Ok(Programs { pin_root: pin_root.display().to_string(), programs: rows })
}

/// Hooks in the order in which they are attached, then tc programs by pod and interface.
fn order(name: &str) -> (usize, Option<TcPin>, String) {
    let hook = HOOKS.iter().position(|(hook, _)| *hook == name).unwrap_or(HOOKS.len());
    (hook, name.parse().ok(), name.to_owned())
}

fn row(layout: &Layout, own: bool, name: &str, loaded: &BTreeMap<u32, ProgramInfo>) -> ProgramRow {
    let tc: Option<TcPin> = name.parse().ok();
    let mut row = ProgramRow {
        hook: tc.map_or(name, |pin| pin.direction.as_str()).to_owned(),
        pod_id: tc.map(|pin| pin.pod_id),
        attached: Attached::Unknown,
        version: version(layout),
        own,
        link_id: None,
        program_id: None,
        program: None,
        tag: None,
        loaded_at: None,
        runs: None,
        run_time_ns: None,
        problem: None,
    };
    let info = match bpf::object_get(&layout.link(name)).and_then(|link| bpf::link_info(link.as_fd())) {
        Ok(info) => info,
        Err(e) => {
            row.problem = Some(format!("the link cannot be opened: {e}"));
            return row;
        }
    };
    row.link_id = Some(info.id);
    row.program_id = Some(info.program_id);
    row.attached = match info.target {
        LinkTarget::Cgroup(0) | LinkTarget::Interface(0) => Attached::Gone,
        LinkTarget::Cgroup(id) => Attached::Cgroup(id),
        LinkTarget::Interface(index) => Attached::Interface(index),
        LinkTarget::Other => Attached::Unknown,
    };
    if row.attached == Attached::Gone {
        row.problem = Some("what it was attached to is gone".to_owned());
    }
    match loaded.get(&info.program_id) {
        Some(program) => describe(&mut row, program),
        None => row.problem = Some("the kernel does not tell about its program".to_owned()),
    }
    row
}

fn describe(row: &mut ProgramRow, program: &ProgramInfo) {
    row.program = Some(String::from_utf8_lossy(program.name()).into_owned());
    row.tag = Some(format!("{:016x}", program.tag()));
    row.loaded_at = program.loaded_at().map(|t: SystemTime| humantime::format_rfc3339_seconds(t).to_string());
    // Nothing was counted unless something is there.
    if program.run_count() > 0 {
        row.runs = Some(program.run_count());
        row.run_time_ns = u64::try_from(program.run_time().as_nanos()).ok();
    }
}
