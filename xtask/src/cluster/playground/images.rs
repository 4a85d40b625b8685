//! Images that need no registry.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::image::oci::{Image, Layer};

/// What keeps a pod's namespaces. It never ends by itself, and runtimes kill it.
pub(super) const PAUSE: &str = "localhost/pause:1";
/// For people's own pods.
pub(super) const BUSYBOX: &str = "localhost/busybox:1";
const PROGRAM: &str = "/usr/bin/busybox";

/// Writes the images of a static busybox; their files.
pub(super) fn write(busybox: &Path, directory: &Path) -> Result<[PathBuf; 2]> {
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    let applets = crate::exec::output(std::process::Command::new(busybox).arg("--list"))?;
    let make = |name: &str, entrypoint: &[&str], file: &str| -> Result<PathBuf> {
        let mut layer = Layer::new();
        for directory in ["/etc", "/proc", "/run", "/sys", "/tmp", "/usr/bin"] {
            layer.directory(Path::new(directory))?;
        }
        layer.link(Path::new("usr/bin"), Path::new("/bin"))?;
        layer.file(busybox, Path::new(PROGRAM))?;
        for applet in applets.lines().filter(|applet| *applet != "busybox") {
            layer.link(Path::new("busybox"), &Path::new("/usr/bin").join(applet))?;
        }
        let path = directory.join(file);
        let to = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        Image { name, entrypoint, layer }.write(&to)?;
        Ok(path)
    };
    let pause = make(PAUSE, &[PROGRAM, "sleep", "infinity"], "pause.tar")?;
    // Runs what a pod's `args` say, also without a `command`.
    Ok([pause, make(BUSYBOX, &["/usr/bin/env"], "busybox.tar")?])
}
