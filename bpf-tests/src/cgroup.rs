//! A cgroup that holds this process while tests run that attach to it.

use std::{
    fs::{self, File},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Name of the inner cgroup.
const INNER: &str = "pod";

/// How many tests use the cgroup now.
static USERS: Mutex<usize> = Mutex::new(0);

/// The process's own cgroup. The process returns to where it was, and the cgroup goes, when the last one is dropped.
///
/// Programs of all tests of a process attach side by side; each knows only its own test's namespace. The process is one level
/// below the cgroup they attach to, as pods are.
pub struct Cgroup {
    directory: File,
    inner: File,
}

impl Cgroup {
    /// Moves the process into its own cgroup unless it is there already.
    pub fn join() -> Result<Self> {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        let path = own_path()?;
        if *users == 0 {
            let inner = path.join(INNER);
            fs::create_dir_all(&inner).with_context(|| format!("creating {}", inner.display()))?;
            move_to(&inner)?;
        }
        let open = |path: &Path| File::open(path).with_context(|| format!("opening {}", path.display()));
        let (directory, inner) = (open(&path)?, open(&path.join(INNER))?);
        *users += 1;
        Ok(Self { directory, inner })
    }

    /// To attach to.
    pub fn directory(&self) -> &File {
        &self.directory
    }

    /// The cgroup below it, where the process is.
    pub fn inner(&self) -> &File {
        &self.inner
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
        *users -= 1;
        if *users == 0
            && let Err(error) = leave()
        {
            eprintln!("leaving the test's cgroup: {error:#}");
        }
    }
}

/// Takes everyone out of the cgroup, children that other tests started included, and removes it.
fn leave() -> Result<()> {
    let path = own_path()?;
    let (parent, inner) = (path.parent().context("a cgroup has a parent")?, path.join(INNER));
    move_to(parent)?;
    let members = fs::read_to_string(inner.join("cgroup.procs")).context("reading the cgroup's members")?;
    for member in members.lines() {
        // one that ended meanwhile is out as well
        let _ = fs::write(parent.join("cgroup.procs"), member);
    }
    let events = path.join("cgroup.events");
    loop {
        let file = File::open(&events).with_context(|| format!("opening {}", events.display()))?;
        if std::io::read_to_string(&file)?.contains("populated 0") {
            break;
        }
        let changed = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], PollTimeout::from(10_000u16))?;
        ensure!(changed == 1, "{} did not get empty within 10 s", path.display());
    }
    for directory in [&inner, &path] {
        fs::remove_dir(directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    Ok(())
}

fn own_path() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    let root = mounts
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find_map(|fields| (fields.get(2) == Some(&"cgroup2")).then(|| fields[1].to_owned()))
        .context("no cgroup2 file system is mounted; mount one on /sys/fs/cgroup/unified")?;
    Ok(Path::new(&root).join(format!("underpass-bpf-tests-{}", std::process::id())))
}

fn move_to(cgroup: &Path) -> Result<()> {
    let path = cgroup.join("cgroup.procs");
    fs::write(&path, std::process::id().to_string()).with_context(|| format!("writing {}", path.display()))
}
