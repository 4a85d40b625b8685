//! Builds the BPF programs, with and without `aya-log`, hashes what they share with the agent, and generates code for
//! the protocols in `proto/`.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya_build::{Package, Toolchain};

/// Everything the BPF programs and the agent must agree on; relative to the repository.
const ABI: [&str; 2] = ["ebpf/abi/src/lib.rs", "ebpf/src/maps.rs"];

fn main() -> Result<()> {
    // Not `env!`: a build script is kept when the repository is moved.
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is set by cargo")?);
    let repository = package.parent().context("the agent lies in a workspace")?;
    protocols()?;
    println!("cargo:rustc-env=UNDERPASS_ABI_HASH={:016x}", abi_hash(repository)?);
    // The pins of aya-ebpf and the release profile are there.
    println!("cargo:rerun-if-changed={}", repository.join("Cargo.toml").display());

    let tools = Tools::find()?;
    let toolchain = tools.prepare()?;
    let root = repository.join("ebpf");
    let root = root.to_str().context("the repository's path is not UTF-8")?;
    let build = |features: &[&str]| {
        let package = Package { name: "underpass-ebpf", root_dir: root, no_default_features: false, features };
        aya_build::build_ebpf([package], Toolchain::Custom(&toolchain))
    };

    // Both builds leave a file of the same name in OUT_DIR, so the first one is moved away.
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is set by cargo")?);
    build(&["log"])?;
    fs::rename(out.join("underpass-bpf"), out.join("underpass-bpf-log"))
        .context("renaming the BPF object built with feature `log`")?;
    build(&[])
}

/// Messages and services of other systems that the agent speaks with.
fn protocols() -> Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/istio_ca.proto"], ["proto"]).context("compiling proto/")?;
    // Connecting and serving are our own: they need TLS with limits and certificates that change.
    tonic_prost_build::configure().build_transport(false).compile_fds(files).context("generating code for proto/")
}

/// FNV-1a over the shared definitions: short, and the same on every compiler.
fn abi_hash(repository: &Path) -> Result<u64> {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for file in ABI {
        let path = repository.join(file);
        println!("cargo:rerun-if-changed={}", path.display());
        for byte in fs::read(&path).with_context(|| format!("reading {}", path.display()))? {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(hash)
}

/// What `cargo xtask setup` prepared for compiling to BPF.
struct Tools {
    directory: PathBuf,
    kind: String,
}

impl Tools {
    fn find() -> Result<Self> {
        for variable in ["UNDERPASS_BPF_TOOLS", "XDG_CACHE_HOME", "HOME"] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let directory = variable("UNDERPASS_BPF_TOOLS")
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("underpass/bpf-tools")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/underpass/bpf-tools")))
            .context("none of UNDERPASS_BPF_TOOLS, XDG_CACHE_HOME and HOME says where the BPF tools are")?;
        let linker = directory.join("bin/bpf-linker");
        ensure!(linker.is_file(), "no BPF linker at {}: run `cargo xtask setup`", linker.display());
        println!("cargo:rerun-if-changed={}", linker.display());
        // cargo compares workspace roots textually, so build-std fails with a symbolic link or ".." in the path
        let directory = directory.canonicalize().with_context(|| format!("resolving {}", directory.display()))?;

        let file = directory.join("kind");
        let kind = if file.exists() {
            println!("cargo:rerun-if-changed={}", file.display());
            fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?.trim().to_owned()
        } else {
            "source".to_owned()
        };
        Ok(Self { directory, kind })
    }

    /// Sets the environment that aya-build's cargo inherits and returns the rustup toolchain to run it with.
    fn prepare(&self) -> Result<String> {
        let mut path = vec![self.directory.join("bin")];
        path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        set("PATH", env::join_paths(path)?);
        // aya-build passes on everything its cargo says as warnings; only real ones should be
        set("CARGO_TERM_QUIET", "true");

        let running = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
        match self.kind.as_str() {
            "source" => {
                // makes a stable rustc build `core` from the source that belongs to it
                set("RUSTC_BOOTSTRAP", "1");
                set("__CARGO_TESTS_ONLY_SRC_ROOT", self.component("rust-src/library")?);
                Ok(running)
            }
            "nightly" => Ok("nightly".to_owned()),
            "web" => {
                // A rustc that comes with `core` for BPF. aya-build unsets RUSTC, but not its configuration key.
                // It would add build-std to RUSTC_BOOTSTRAP=1, so the crates that need nightly features are named.
                set("CARGO_BUILD_RUSTC", self.component("web/usr/bin/rustc")?);
                set("RUSTC_BOOTSTRAP", "aya_ebpf,aya_ebpf_bindings,aya_log_ebpf,underpass_bpf");
                let libraries = fs::read_dir(self.component("web/usr/lib")?)?
                    .filter_map(|entry| Some(entry.ok()?.path()))
                    .filter(|path| path.to_string_lossy().ends_with("-linux-gnu"));
                let inherited = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
                set("LD_LIBRARY_PATH", env::join_paths(libraries.chain(env::split_paths(&inherited)))?);
                Ok(running)
            }
            other => bail!(
                "{} says `{other}`, which is none of source, nightly and web: run `cargo xtask setup`",
                self.directory.join("kind").display()
            ),
        }
    }

    fn component(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        ensure!(path.exists(), "{} is missing: run `cargo xtask setup`", path.display());
        path.canonicalize().with_context(|| format!("resolving {}", path.display()))
    }
}

fn set(variable: &str, value: impl AsRef<std::ffi::OsStr>) {
    // SAFETY: this program has one thread until aya-build starts its own, after the last call of this.
    unsafe { env::set_var(variable, value) };
}
