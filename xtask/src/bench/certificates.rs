//! Certificates for the other proxies: ECDSA on P-256, as Underpass' own.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::exec;

/// A CA, and a certificate for each side.
pub(super) struct Certificates {
    directory: PathBuf,
}

impl Certificates {
    /// Makes them in a directory.
    pub(super) fn make(directory: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
        let this = Self { directory };
        this.request("ca", &["-addext", "basicConstraints=critical,CA:TRUE"])?;
        let (ca, key) = (this.authority(), this.key("ca"));
        for name in ["client", "server"] {
            let alternative = format!("subjectAltName=DNS:{name}");
            let by = ["-CA", text(&ca)?, "-CAkey", text(&key)?, "-addext", &alternative];
            this.request(name, &[&by[..], &["-addext", "basicConstraints=critical,CA:FALSE"]].concat())?;
        }
        Ok(this)
    }

    fn request(&self, name: &str, more: &[&str]) -> Result<()> {
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
        openssl.args(["-subj", &format!("/CN={name}")]).arg("-keyout").arg(self.key(name));
        openssl.arg("-out").arg(self.certificate(name)).args(more);
        exec::output(&mut openssl).map(drop)
    }

    /// The CA's certificate.
    pub(super) fn authority(&self) -> PathBuf {
        self.certificate("ca")
    }

    /// That of `client` or `server`.
    pub(super) fn certificate(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.pem"))
    }

    pub(super) fn key(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.key"))
    }
}

fn text(path: &std::path::Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
