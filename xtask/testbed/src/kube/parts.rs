//! Where the programs of Kubernetes are.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

/// Environment variable with another directory for the programs.
pub const PARTS_VARIABLE: &str = "UNDERPASS_KUBE_PARTS";

/// Version of Kubernetes, and the edition of how it is built: the name of the directory with the programs.
pub const VERSION: &str = "1.20.2-1";

/// The Python package kubernetes-validate with what it needs, below the directory of the programs.
pub const VALIDATOR: &str = "python/kubernetes-validate-1.37.0";

/// Programs that a control plane is made of.
const CONTROL_PLANE: &[&str] = &["etcd", "etcdctl", "kube-apiserver", "kube-controller-manager", "kubectl"];

/// A directory with programs of Kubernetes. `cargo xtask cluster parts` makes it.
#[derive(Debug, Clone)]
pub struct Parts {
    directory: PathBuf,
}

impl Parts {
    /// The directory that `UNDERPASS_KUBE_PARTS` names, else the usual one in the user's cache, with all that a control plane needs.
    pub fn find() -> Result<Self> {
        let parts = Self { directory: Self::directory()? };
        for name in CONTROL_PLANE {
            parts.program(name)?;
        }
        Ok(parts)
    }

    /// The directory for programs, whether there are any or not.
    pub fn directory() -> Result<PathBuf> {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(directory) = variable(PARTS_VARIABLE) {
            return Ok(directory);
        }
        let cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
        let cache = cache.context("neither XDG_CACHE_HOME nor HOME is set: where are cached files?")?;
        Ok(cache.join("underpass/k8s").join(VERSION))
    }

    /// Programs that a control plane is made of.
    pub fn of_control_plane() -> &'static [&'static str] {
        CONTROL_PLANE
    }

    /// The directory as [`find`](Self::find) has it, for tests that need other programs.
    pub fn unchecked() -> Result<Self> {
        Ok(Self { directory: Self::directory()? })
    }

    /// The directory for `PYTHONPATH` in which kubernetes-validate is.
    pub fn validator(&self) -> Result<PathBuf> {
        let path = self.directory.join(VALIDATOR);
        ensure!(path.is_dir(), "no {}: `cargo xtask cluster parts --chart` makes it, once", path.display());
        Ok(path)
    }

    /// The path of a program, which is there.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join("bin").join(name);
        ensure!(
            path.is_file(),
            "no {name} in {}: `cargo xtask cluster parts` makes it, once; or {PARTS_VARIABLE} names a directory with bin/{name}",
            self.directory.display()
        );
        Ok(path)
    }

    /// The directory that they are in.
    pub fn path(&self) -> &Path {
        &self.directory
    }
}
