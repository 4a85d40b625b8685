//! Removing a playground, whole or not.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result};

use super::{cgroups, mount_points, network, place::Place, record::Record};

/// Removes everything; the number of recorded programs that still ran. What is not there is no error, so it can be done again.
pub(super) fn remove(place: &Place) -> Result<usize> {
    // A record that cannot be read only leaves out what control groups do not find anyway.
    let record = Record::read(place).ok().flatten().unwrap_or_default();
    let alive = record.processes.iter().filter(|process| process.is_alive()).count();
    // Who starts others before those who were started.
    for process in record.processes.iter().rev() {
        process.kill();
    }
    cgroups::remove(place)?;
    network::remove(place)?;
    // Nodes have mounts of their own, which ended with their processes; what somebody mounted by hand would be in the way.
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    for mount in below(&mounts, place.directory()) {
        crate::exec::output(Command::new("umount").arg("--lazy").arg(mount))?;
    }
    mount_points::release(place, &record.mount_points)?;
    match fs::remove_dir_all(place.directory()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", place.directory().display()))
        }
        _ => Ok(alive),
    }
}

/// Mounted directories below `directory`, inner ones first.
fn below<'a>(mounts: &'a str, directory: &Path) -> Vec<&'a Path> {
    let mounted = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    let mut found: Vec<_> = mounted.filter(|path| path.starts_with(directory)).collect();
    found.reverse();
    found
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::below;

    #[test]
    fn only_the_playgrounds_mounts() {
        let mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /t/cluster/a tmpfs rw 0 0\nx /t/cluster/a/b tmpfs rw 0 0\ny /t/cluster-2 tmpfs rw 0 0\n";
        assert_eq!(below(mounts, Path::new("/t/cluster")), ["/t/cluster/a/b", "/t/cluster/a"].map(Path::new));
    }
}
