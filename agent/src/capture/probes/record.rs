//! Recording the connections that probe cgroups open, for networks that take the sockets off
//! packets.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

use crate::{
    capture::pins::{self, Layout},
    sys::bpf::{self, LinkTarget},
};

/// Name of a link's pin before the id of its cgroup.
const PIN: &str = "probe-";

/// Attaches the program that records connections, and keeps the links pinned: probes go on while no
/// agent runs.
pub struct Recorder {
    program: OwnedFd,
    layout: Layout,
}

impl Recorder {
    /// Attaches `program` to nothing yet; links of an earlier agent stay until
    /// [`record`](Self::record).
    pub fn new(program: OwnedFd, layout: &Layout) -> Self {
        Self { program, layout: layout.clone() }
    }

    /// Records the connections of these cgroups, ids and directories, and of no others. Returns by
    /// id what failed, and why.
    pub(super) fn record(&self, cgroups: &BTreeMap<u64, PathBuf>) -> BTreeMap<u64, String> {
        if let Err(error) = self.remove_others(cgroups) {
            tracing::warn!(%error, "links to cgroups that send no probes any more stay");
        }
        let attach = |(id, directory): (&u64, &PathBuf)| {
            let failure = self.attach(*id, directory).err()?;
            Some((*id, format!("attaching to {}: {failure}", directory.display())))
        };
        cgroups.iter().filter_map(attach).collect()
    }

    fn remove_others(&self, cgroups: &BTreeMap<u64, PathBuf>) -> Result<(), super::CaptureError> {
        for path in pins::list(&self.layout.links())? {
            let id = path.file_name().and_then(|name| name.to_str()?.strip_prefix(PIN)?.parse().ok());
            if id.is_some_and(|id: u64| !cgroups.contains_key(&id)) {
                pins::remove(&path)?;
            }
        }
        Ok(())
    }

    fn attach(&self, id: u64, directory: &Path) -> Result<(), String> {
        let pin = self.layout.link(format_args!("{PIN}{id}"));
        match bpf::object_get(&pin) {
            Ok(link) => {
                let info = bpf::link_info(link.as_fd()).map_err(|e| format!("reading {}: {e}", pin.display()))?;
                if info.target == LinkTarget::Cgroup(id) {
                    let own = bpf::program_id(self.program.as_fd()).map_err(|e| e.to_string())?;
                    if info.program_id == own {
                        return Ok(());
                    }
                    return bpf::link_update(link.as_fd(), self.program.as_fd())
                        .map_err(|e| format!("replacing the program of {}: {e}", pin.display()));
                }
                pins::remove(&pin).map_err(|e| e.to_string())?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(format!("opening {}: {e}", pin.display())),
        }
        let cgroup = File::open(directory).map_err(|e| e.to_string())?;
        if cgroup.metadata().map_err(|e| e.to_string())?.ino() != id {
            return Err("another cgroup has taken its place; it is looked at again".to_owned());
        }
        let link = bpf::link_cgroup_egress(self.program.as_fd(), cgroup.as_fd()).map_err(|e| match e.raw_os_error() {
            Some(libc::EPERM) => format!(
                "{e}; another program there allows none beside it, as with IPAccounting= or IPAddressDeny= of a systemd \
                 unit without Delegate=: turn these off for the unit, or set Delegate=yes"
            ),
            _ => e.to_string(),
        })?;
        bpf::object_pin(link.as_fd(), &pin).map_err(|e| format!("pinning {}: {e}", pin.display()))
    }
}
