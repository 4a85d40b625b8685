//! Where things are pinned, and who may touch them.
//!
//! ```text
//! PIN_ROOT/<ABI hash>/maps/<NAME>
//! PIN_ROOT/<ABI hash>/links/{connect4, connect6, getpeername4, ..., sockops}
//! PIN_ROOT/<ABI hash>/links/probe-<id of a probe cgroup>
//! PIN_ROOT/<ABI hash>/links/tc-<pod id>-<interface index>-{ingress,egress}
//! PIN_ROOT/<ABI hash>/links/tc-<pod id>-<number of the link>-{ingress,egress}-moved
//! PIN_ROOT/<ABI hash>/links/tc-<pod id>-<interface index on the node>-node
//! PIN_ROOT/<ABI hash>/pods/<namespace cookie>
//! ```
//! bpffs refuses dots in names.

use std::{
    fmt, fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs},
};

use super::CaptureError;

/// Where the kernel expects bpffs; mounted there when nobody did.
const BPFFS: &str = "/sys/fs/bpf";
/// Appended to the name of a pin that is about to replace another one.
const REPLACEMENT: &str = "-new";

/// The paths of one ABI version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    dir: PathBuf,
}

/// Appended to the name of a pin whose interface has left the pod's namespace.
const MOVED: &str = "-moved";

/// Which way packets go through a tc program, and where it stands. Links are removed in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
    /// From the pod, on the node's side of the interface.
    Node,
}

impl Direction {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::Ingress, Self::Egress, Self::Node];

    /// For names of files, and for people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::Node => "node",
        }
    }
}

/// What a tc link's file name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TcPin {
    /// The pod's number.
    pub pod_id: u32,
    /// The interface's index in the pod's namespace, or in the node's for [`Direction::Node`]. The
    /// number of the link for one whose interface has moved: the index is another interface's by
    /// now, or none's.
    pub interface: u32,
    /// Which way.
    pub direction: Direction,
    /// The interface has left the pod's namespace, and lives.
    pub moved: bool,
}

impl fmt::Display for TcPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moved = if self.moved { MOVED } else { "" };
        write!(f, "tc-{}-{}-{}{moved}", self.pod_id, self.interface, self.direction.as_str())
    }
}

impl FromStr for TcPin {
    type Err = ();

    /// Also reads the name of an unfinished replacement, so that it is found and removed with its pod.
    fn from_str(s: &str) -> Result<Self, ()> {
        let name = s.strip_suffix(REPLACEMENT).unwrap_or(s);
        let (name, moved) = name.strip_suffix(MOVED).map_or((name, false), |name| (name, true));
        let mut parts = name.strip_prefix("tc-").ok_or(())?.split('-');
        let mut number = || parts.next().and_then(|p| p.parse().ok()).ok_or(());
        let (pod_id, interface) = (number()?, number()?);
        let (Some(direction), None) = (parts.next(), parts.next()) else { return Err(()) };
        let direction = Direction::ALL.into_iter().find(|d| d.as_str() == direction).ok_or(())?;
        Ok(Self { pod_id, interface, direction, moved })
    }
}

impl Layout {
    /// The directory of `version` (an ABI hash) under `root`.
    pub fn new(root: &Path, version: &str) -> Self {
        Self { dir: root.join(version) }
    }

    /// The version's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Directory of the maps.
    pub fn maps(&self) -> PathBuf {
        self.dir.join("maps")
    }

    /// Directory of the links.
    pub fn links(&self) -> PathBuf {
        self.dir.join("links")
    }

    /// Directory of the records of captured namespaces.
    pub fn pods(&self) -> PathBuf {
        self.dir.join("pods")
    }

    /// A map's pin.
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// A link's pin: a cgroup hook's name, or a [`TcPin`].
    pub fn link(&self, name: impl fmt::Display) -> PathBuf {
        self.links().join(name.to_string())
    }

    /// Makes the directories, for root only.
    pub fn create(&self) -> Result<(), CaptureError> {
        for dir in [self.maps(), self.links(), self.pods()] {
            make_private_dir(&dir)?;
        }
        Ok(())
    }

    /// Every tc link's pin, sorted, with its path.
    pub fn tc_pins(&self) -> Result<Vec<(TcPin, PathBuf)>, CaptureError> {
        let mut pins: Vec<_> = list(&self.links())?
            .into_iter()
            .filter_map(|path| Some((path.file_name()?.to_str()?.parse().ok()?, path)))
            .collect();
        pins.sort();
        Ok(pins)
    }
}

/// The path under which what shall replace the pin at `path` is pinned first. A leftover of an interrupted replacement
/// is removed.
pub fn replacement(path: &Path) -> Result<PathBuf, CaptureError> {
    let mut name = path.as_os_str().to_owned();
    name.push(REPLACEMENT);
    let path = PathBuf::from(name);
    remove(&path)?;
    Ok(path)
}

/// Puts the pin at `new` in the place of the one at `path`: no moment without either.
pub fn replace(new: &Path, path: &Path) -> Result<(), CaptureError> {
    fs::rename(new, path).map_err(|source| CaptureError::Path { action: "replace pin", path: path.into(), source })
}

/// Removes a pin. True when there was one.
pub fn remove(path: &Path) -> Result<bool, CaptureError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(CaptureError::Path { action: "remove pin", path: path.into(), source }),
    }
}

/// The entries of a directory, sorted; none when it does not exist.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    let failed = |source| CaptureError::Path { action: "list", path: dir.into(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut paths = entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    paths.sort();
    Ok(paths)
}

/// Directories of ABI versions under `root`, other than `except`. Anything else there is not ours.
pub fn versions(root: &Path, except: Option<&str>) -> Result<Vec<Layout>, CaptureError> {
    Ok(list(root)?
        .into_iter()
        .filter(|p| {
            let name = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            p.is_dir() && is_version(name) && Some(name) != except
        })
        .map(|dir| Layout { dir })
        .collect())
}

/// An ABI hash: 16 lower-case hexadecimal digits.
fn is_version(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Makes sure that `root` is a private directory on a bpffs, mounting one at `/sys/fs/bpf` when that is where it
/// belongs.
pub fn prepare_root(root: &Path) -> Result<(), CaptureError> {
    if !on(root, BPF_FS_MAGIC)? {
        if root.parent() != Some(Path::new(BPFFS)) {
            return Err(CaptureError::Bpf {
                action: format!("use pin directory {}", root.display()),
                reason: format!("it is not on a bpffs; mount one (mount -t bpf bpf DIRECTORY) or pin under {BPFFS}"),
            });
        }
        mount_bpffs()?;
    }
    make_private_dir(root)
}

fn mount_bpffs() -> Result<(), CaptureError> {
    // Two agents (with different pin roots) that start on a fresh machine must not mount one over the other's pins.
    let _alone = super::lock::exclusive(Path::new(BPFFS))?;
    if on(Path::new(BPFFS), BPF_FS_MAGIC)? {
        return Ok(());
    }
    tracing::info!(path = BPFFS, "mounting bpffs");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700")).map_err(|e| CaptureError::Path {
        action: "mount a bpffs on",
        path: BPFFS.into(),
        source: e.into(),
    })
}

/// Checks that `path` is a directory of a cgroup v2 hierarchy (also the `unified` part of a hybrid one).
pub fn check_cgroup(path: &Path) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Path { action: "use cgroup", path: path.into(), source };
    let meta = fs::metadata(path).map_err(failed)?;
    if meta.is_dir() && statfs(path).map_err(|e| failed(e.into()))?.filesystem_type() == CGROUP2_SUPER_MAGIC {
        return Ok(());
    }
    let mounts = cgroup2_mounts();
    let remedy = if mounts.is_empty() {
        "no cgroup v2 hierarchy is mounted; mount one with `mount -t cgroup2 none DIRECTORY`".to_owned()
    } else {
        format!("cgroup v2 is mounted at {}; name a directory there", mounts.join(", "))
    };
    Err(CaptureError::Bpf {
        action: format!("use cgroup {}", path.display()),
        reason: format!("not a cgroup v2 directory; {remedy}"),
    })
}

fn cgroup2_mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    table
        .lines()
        .filter_map(|l| {
            let mut fields = l.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| path.to_owned())
        })
        .collect()
}

/// Is `path`, or the nearest existing directory above it, on a file system of this kind?
fn on(path: &Path, kind: FsType) -> Result<bool, CaptureError> {
    for dir in path.ancestors() {
        match statfs(dir) {
            Ok(s) => return Ok(s.filesystem_type() == kind),
            Err(nix::Error::ENOENT) => {}
            Err(e) => return Err(CaptureError::Path { action: "look at", path: dir.into(), source: e.into() }),
        }
    }
    Ok(false)
}

/// Makes `path` (and what is missing above it) for root only; narrows the mode of one that exists.
fn make_private_dir(path: &Path) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Path { action: "make directory", path: path.into(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed)
}
