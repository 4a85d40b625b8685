//! Where things are.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// The repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the repository")
}

/// cargo's target directory.
pub(crate) fn target() -> PathBuf {
    variable("CARGO_TARGET_DIR").unwrap_or_else(|| repository().join("target"))
}

/// What is kept between checkouts.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    Ok(base.context("neither XDG_CACHE_HOME nor HOME is set: where may files be cached?")?.join("underpass"))
}

/// The BPF toolchain; the agent's build script looks at the same place.
pub(crate) fn bpf_tools() -> Result<PathBuf> {
    variable("UNDERPASS_BPF_TOOLS").map_or_else(|| Ok(cache()?.join("bpf-tools")), Ok)
}

/// The program `name` in `PATH` or where administrators' programs are.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(more).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// An environment variable that is set and not empty.
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
