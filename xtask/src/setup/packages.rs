//! Programs and libraries of the operating system.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;

use crate::{bench::NGINX_STREAM, exec, places, ui::Ui};

/// Something that has to be there.
pub(super) struct Need {
    /// A program, or the absolute path of a file.
    file: &'static str,
    /// Debian's and Ubuntu's package.
    package: &'static str,
    /// What for.
    why: &'static str,
}

/// For everything.
pub(super) const NEEDS: &[Need] = &[
    Need { file: "cc", package: "gcc", why: "linking, and C parts of the TLS library" },
    Need { file: "c++", package: "g++", why: "the fuzzer's runtime" },
    Need { file: "pkg-config", package: "pkg-config", why: "finding the libraries below" },
    Need { file: "/usr/include/libelf.h", package: "libelf-dev", why: "libbpf, which the BPF tests use" },
    Need { file: "/usr/include/zlib.h", package: "zlib1g-dev", why: "libbpf, which the BPF tests use" },
    Need { file: "ip", package: "iproute2", why: "network namespaces of tests and demo" },
    Need { file: "nsenter", package: "util-linux", why: "starting programs in them" },
    Need { file: "nginx", package: "nginx-light", why: "a server in tests and demo" },
    Need { file: "redis-server", package: "redis-server", why: "a server in tests and demo" },
    Need { file: "redis-benchmark", package: "redis-tools", why: "request rates" },
    Need { file: "iperf3", package: "iperf3", why: "throughput" },
    Need { file: "curl", package: "curl", why: "a client in tests and demo" },
    Need { file: "openssl", package: "openssl", why: "hostile and foreign certificates in tests" },
    Need { file: "sysctl", package: "procps", why: "kernel parameters in tests" },
    Need { file: "depmod", package: "kmod", why: "kernel modules of test machines" },
    Need { file: "xz", package: "xz-utils", why: "kernel modules of test machines" },
    Need { file: "tcpdump", package: "tcpdump", why: "looking at test networks by hand" },
    Need { file: "prometheus", package: "prometheus", why: "checking the dashboard and the rules" },
    Need { file: "tmux", package: "tmux", why: "a terminal for `underpass top` in tests" },
    Need { file: "python3", package: "python3", why: "a client with sockets of its own in tests" },
];

/// For benchmarks, besides.
pub(super) const BENCH: &[Need] = &[
    Need { file: NGINX_STREAM, package: "libnginx-mod-stream", why: "a pair of proxies to compare with" },
    Need { file: "stunnel4", package: "stunnel4", why: "a pair of proxies to compare with" },
    Need { file: "wg", package: "wireguard-tools", why: "WireGuard to compare with, in virtual machines" },
];

/// What is not there of what is needed.
pub(super) fn missing(needs: &'static [Need]) -> Vec<&'static Need> {
    needs.iter().filter(|need| !present(need.file)).collect()
}

fn present(file: &str) -> bool {
    if file.starts_with('/') { Path::new(file).exists() } else { places::program(file).is_some() }
}

/// Installs packages, telling which and why. Services that come with them are not started.
pub(super) fn install(ui: &Ui, needs: &[&Need]) -> Result<()> {
    let mut names: Vec<_> = needs.iter().map(|need| need.package).collect();
    names.dedup();
    ui.say("Installing packages of the operating system:");
    for need in needs {
        ui.say(&format!("  {:<14} {}", need.package, need.why));
    }
    let by_hand = format!("apt-get install --no-install-recommends {}", names.join(" "));
    if places::program("apt-get").is_none() {
        let files: Vec<_> = needs.iter().map(|need| need.file).collect();
        bail!("there is no apt-get here: install what provides {} and run this again", files.join(", "));
    }
    if !geteuid().is_root() {
        bail!("installing packages needs root: run `sudo {by_hand}` and then this again");
    }
    ui.step("apt-get install", |step| {
        let _quiet = NoServices::begin()?;
        let install = || {
            let mut apt = Command::new("apt-get");
            apt.args(["install", "--yes", "--no-install-recommends"])
                .args(&names)
                .env("DEBIAN_FRONTEND", "noninteractive");
            exec::quietly(&mut apt, step)
        };
        // The lists may be missing or too old.
        install().or_else(|_| exec::quietly(Command::new("apt-get").arg("update"), step).and_then(|()| install()))
    })
    .with_context(|| format!("installing packages; `{by_hand}` shows what is wrong"))?;
    if let Some(need) = needs.iter().find(|need| !present(need.file)) {
        bail!("{} is still missing although {} was installed", need.file, need.package);
    }
    Ok(())
}

/// While it exists, package scripts do not start services (Debian policy 9.3.3).
struct NoServices {
    created: Option<PathBuf>,
}

impl NoServices {
    fn begin() -> Result<Self> {
        let path = PathBuf::from("/usr/sbin/policy-rc.d");
        if path.exists() {
            return Ok(Self { created: None });
        }
        fs::write(&path, "#!/bin/sh\nexit 101\n").with_context(|| format!("writing {}", path.display()))?;
        let this = Self { created: Some(path.clone()) };
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(this)
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = &self.created
            && let Err(error) = fs::remove_file(path)
        {
            eprintln!("removing {}: {error}; remove it by hand, it keeps services from starting", path.display());
        }
    }
}
