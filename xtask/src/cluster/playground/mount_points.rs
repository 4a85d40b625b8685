//! Directories of the machine that nodes mount theirs on.
//!
//! Playgrounds share those that had to be made: each puts a file with its name into them, which nodes do not see, and the last one removes
//! them. A directory that is removed takes with it what is mounted there in other namespaces, so none may go too early.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{place::Place, programs::Stage};

/// How the files begin that say who uses a directory.
const MARK: &str = ".underpass-playground-";

/// Makes those of `wanted` that are not there, with those above them, and remembers which.
pub(super) fn claim(stage: &mut Stage<'_>, wanted: &[&str]) -> Result<()> {
    testbed::locked(|| {
        let paths = wanted.iter().flat_map(|path| Path::new(path).ancestors().collect::<Vec<_>>().into_iter().rev());
        let mut ours: Vec<PathBuf> =
            paths.filter(|path| !path.exists() || is_marked(path)).map(Path::to_path_buf).collect();
        ours.dedup();
        stage.record.mount_points = ours;
        // First: what is made has to be known.
        stage.record.write(stage.place)?;
        for path in &stage.record.mount_points {
            let mark = mark(stage.place, path);
            fs::create_dir_all(path)
                .and_then(|()| fs::write(&mark, ""))
                .with_context(|| format!("creating {}", mark.display()))?;
        }
        Ok(())
    })
}

/// Gives up what was claimed; removes what nobody else uses.
pub(super) fn release(place: &Place, claimed: &[PathBuf]) -> Result<()> {
    testbed::locked(|| {
        for path in claimed.iter().rev() {
            for result in [fs::remove_file(mark(place, path)), fs::remove_dir(path)] {
                let usual = [io::ErrorKind::NotFound, io::ErrorKind::DirectoryNotEmpty];
                if let Err(error) = result
                    && !usual.contains(&error.kind())
                {
                    return Err(error).with_context(|| format!("removing {}", path.display()));
                }
            }
        }
        Ok(())
    })
}

fn mark(place: &Place, directory: &Path) -> PathBuf {
    directory.join(format!("{MARK}{}", place.cgroup()))
}

/// Whether another playground made it.
fn is_marked(directory: &Path) -> bool {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(MARK))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{claim, release};
    use crate::cluster::playground::{place::Place, programs::Stage, record::Record};

    #[test]
    fn the_last_one_removes_what_the_first_one_made() {
        let machine = tempfile::tempdir().unwrap();
        let wanted = machine.path().join("etc/cni/net.d");
        let places = ["one", "other"].map(|name| Place::at(machine.path().join(name)));
        let claimed = places.each_ref().map(|place| {
            std::fs::create_dir(place.directory()).unwrap();
            let mut stage = Stage { place, parts: Path::new("/"), record: Record::default() };
            claim(&mut stage, &[wanted.to_str().unwrap()]).unwrap();
            stage.record.mount_points
        });
        assert_eq!(claimed[0], claimed[1]);
        assert_eq!(claimed[0].len(), 3, "{claimed:?}");
        release(&places[0], &claimed[0]).unwrap();
        assert!(wanted.exists());
        release(&places[1], &claimed[1]).unwrap();
        assert!(!machine.path().join("etc").exists());
        release(&places[1], &claimed[1]).unwrap();
    }
}
