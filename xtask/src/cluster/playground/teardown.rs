//! Removing a playground, whole or not.

use anyhow::Result;

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
    mount_points::release(place, &record.mount_points)?;
    // Nodes have mounts of their own, which ended with their processes; what somebody mounted by
    // hand would be in the way.
    testbed::mounts::remove_dir_all(place.directory())?;
    Ok(alive)
}
