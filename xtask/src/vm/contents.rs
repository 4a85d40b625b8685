//! What a test machine has besides a kernel and tests: programs of this machine with their libraries, and a few files of `/etc`.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::archive::Archive;
use crate::{bench::NGINX_STREAM, exec, places};

/// Programs that tests start, by name. Add one here and it is in the machine.
const PROGRAMS: &[&str] = &[
    // Of the testbed.
    "curl",
    "ip",
    "iperf3",
    "nginx",
    "nsenter",
    "openssl",
    "redis-benchmark",
    "redis-cli",
    "redis-server",
    "ss",
    "tc",
    // Of tests with a terminal.
    "tmux",
    // Of scripts in tests.
    "bash",
    "cat",
    "env",
    "kill",
    "ls",
    "mkdir",
    "mount",
    "readlink",
    "setpriv",
    "sh",
    "sleep",
    "sysctl",
    "timeout",
    "true",
    "unshare",
    // The kernel's.
    "kmod",
    "modprobe",
];
/// What benchmarks start besides, and a module of nginx.
const BENCH: &[&str] = &["stunnel4", "wg"];
/// Paths that the kernel, programs and tests have built in.
const PATHS: &[&str] = &["/bin/sh", "/sbin/modprobe", "/lib", "/lib64"];
/// Configuration and data, where it exists.
const FILES: &[&str] = &[
    "/usr/lib/ssl/openssl.cnf",
    "/etc/ssl/openssl.cnf",
    "/etc/iproute2",
    "/usr/share/iproute2",
    // tmux does not start without a UTF-8 locale.
    "/usr/lib/locale/C.utf8",
];
/// Directories that have to be there. Everybody may pass root's: programs may be installed there.
const DIRECTORIES: &[(&str, u32)] = &[
    ("/dev", 0o755),
    ("/proc", 0o555),
    ("/sys", 0o555),
    ("/root", 0o755),
    ("/run", 0o755),
    ("/tmp", 0o1777),
    ("/var/lib/nginx", 0o755),
    ("/var/log/nginx", 0o755),
    ("/var/tmp", 0o1777),
];
/// Users are root and nobody.
const TEXTS: &[(&str, &str)] = &[
    ("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n"),
    ("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
];
/// Prints where Python is and every file of what tests import, each on a line.
const PYTHON: &str =
    "import sys, encodings.idna, encodings.ascii, encodings.latin_1, socket, time, os, struct, threading, json
print(sys.executable)
for module in list(sys.modules.values()):
    for name in ('__file__', '__cached__'):
        if isinstance(getattr(module, name, None), str): print(getattr(module, name))
";

/// Puts everything into `archive`. `programs` are tests and the like, built here, whose libraries are needed too. `bench` adds what
/// benchmarks need.
pub(super) fn fill(archive: &mut Archive, programs: &[PathBuf], bench: bool) -> Result<()> {
    for (path, mode) in DIRECTORIES {
        archive.directory(path, *mode);
    }
    for (path, text) in TEXTS {
        archive.text(path, *text);
    }
    for path in FILES.iter().map(Path::new).filter(|path| path.exists()) {
        let path = archive.same(path)?;
        if path.is_dir() {
            archive.tree(&path, &path)?;
        }
    }
    for path in PATHS {
        archive.same(Path::new(path))?;
    }
    let mut needing: BTreeSet<PathBuf> = programs.iter().cloned().collect();
    if bench {
        needing.insert(archive.same(Path::new(NGINX_STREAM))?);
    }
    for name in PROGRAMS.iter().chain(bench.then_some(BENCH).into_iter().flatten()) {
        let path = places::program(name).with_context(|| format!("{name} is not installed, which tests need"))?;
        needing.insert(archive.same(&path)?);
    }
    needing.extend(python(archive)?);
    for library in libraries(&needing)? {
        archive.same(&library)?;
    }
    Ok(())
}

/// Python and the part of its library that tests use; what of it is linked to libraries.
fn python(archive: &mut Archive) -> Result<Vec<PathBuf>> {
    // Not what PATH has, which may be a script that chooses among several.
    let text = exec::output(Command::new("python3").args(["-I", "-c", PYTHON]))?;
    let files: Vec<_> = text.lines().map(PathBuf::from).filter(|path| path.is_file()).collect();
    let program = files.first().context("python3 does not know where it is")?;
    let mut linked = Vec::new();
    for file in &files {
        let file = archive.same(file)?;
        if file.extension().is_none_or(|ending| ending == "so") || file == *program {
            linked.push(file);
        }
    }
    linked.push(archive.same(program)?);
    // Python looks for this directory beside its library.
    if let Some(library) = files.iter().find(|file| file.ends_with("os.py")).and_then(|file| file.parent()) {
        archive.directory(library.join("lib-dynload"), 0o755);
    }
    if program.parent() != Some(Path::new("/usr/bin")) {
        archive.link("/usr/bin/python3", program);
    }
    Ok(linked)
}

/// Every shared library that programs and libraries are linked to, and their loader.
pub(crate) fn libraries(files: &BTreeSet<PathBuf>) -> Result<BTreeSet<PathBuf>> {
    // It fails when one of them is linked statically, which is none of the others' business.
    let output = Command::new("ldd").args(files).output().context("running ldd")?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(library).collect())
}

/// The path in a line of ldd: `libm.so.6 => /lib/libm.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn library(line: &str) -> Option<PathBuf> {
    let (path, _) = line.trim().rsplit_once(" (0x")?;
    let path = path.split_once(" => ").map_or(path, |(_, path)| path);
    path.starts_with('/').then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::library;

    #[test]
    fn lines_of_ldd() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(
            library("\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f)"),
            path("/lib/x86_64-linux-gnu/libm.so.6")
        );
        assert_eq!(library("\t/lib64/ld-linux-x86-64.so.2 (0x00007f)"), path("/lib64/ld-linux-x86-64.so.2"));
        assert_eq!(library("\tlinux-vdso.so.1 (0x00007f)"), None);
        assert_eq!(library("/usr/bin/curl:"), None);
        assert_eq!(library("\tnot a dynamic executable"), None);
    }
}
