//! Certificates and keys of one control plane: a new authority each time.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::Write,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::json;

use crate::addresses::{control_plane_v4, control_plane_v6, vips};

/// Somebody whom the API server knows by a client certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct User {
    name: String,
    group: Option<String>,
}

impl User {
    /// A user with a name and no group but `system:authenticated`.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), group: None }
    }

    /// May do everything.
    pub fn admin() -> Self {
        Self::new("admin").in_group("system:masters")
    }

    /// The kubelet of a node.
    pub fn node(node: &str) -> Self {
        Self::new(&format!("system:node:{node}")).in_group("system:nodes")
    }

    /// The same user in this group instead.
    #[must_use]
    pub fn in_group(self, group: &str) -> Self {
        Self { group: Some(group.to_owned()), ..self }
    }

    /// Its name with nothing that a file's name cannot have.
    fn file_name(&self) -> String {
        let text = format!("{}@{}", self.name, self.group.as_deref().unwrap_or_default());
        text.replace(|c: char| !c.is_ascii_alphanumeric() && c != '@', "-")
    }
}

/// A certificate authority with its files.
pub struct Pki {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    /// The authority's certificate.
    certificate: Certificate,
}

impl std::fmt::Debug for Pki {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pki").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Pki {
    /// Makes the authority, the API server's certificate and the key that signs service accounts' tokens, as files in `directory`, which is made.
    pub fn create(directory: &Path) -> Result<Self> {
        DirBuilder::new().mode(0o700).create(directory).with_context(|| format!("creating {}", directory.display()))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("testbed authority", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().context("making a key")?;
        let certificate = params.self_signed(&key).context("making the authority's certificate")?;
        let pki = Self { directory: directory.to_path_buf(), issuer: Issuer::new(params, key), certificate };
        pki.write("ca.crt", &pki.certificate.pem())?;
        pki.write("ca.key", &pki.issuer.key().serialize_pem())?;

        let (certificate, key) = pki.sign("kube-apiserver", None, server_names()?)?;
        pki.write("apiserver.crt", &certificate)?;
        pki.write("apiserver.key", &key)?;
        let key = KeyPair::generate().context("making a key")?;
        pki.write("service-accounts.key", &key.serialize_pem())?;
        pki.write("service-accounts.pub", &key.public_key_pem())?;
        Ok(pki)
    }

    /// The path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The authority's certificate, PEM.
    pub fn ca(&self) -> String {
        self.certificate.pem()
    }

    /// A kubeconfig of `user` for the server at `url`. A new certificate each time, at the same path for the same user and `view`.
    pub fn kubeconfig(&self, user: &User, url: &str, view: &str) -> Result<PathBuf> {
        let (certificate, key) = self.sign(&user.name, user.group.as_deref(), Vec::new())?;
        let encoded = |text: &str| BASE64_STANDARD.encode(text);
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "testbed", "cluster": { "server": url, "certificate-authority-data": encoded(&self.ca()) } }],
            "users": [{
                "name": user.name,
                "user": { "client-certificate-data": encoded(&certificate), "client-key-data": encoded(&key) },
            }],
            "contexts": [{ "name": "testbed", "context": { "cluster": "testbed", "user": user.name } }],
            "current-context": "testbed",
        });
        self.write(&format!("{}.{view}.kubeconfig", user.file_name()), &config.to_string())
    }

    /// Paths of a new certificate of `user` and of its key, for programs that take no kubeconfig.
    pub fn certificate(&self, user: &User) -> Result<[PathBuf; 2]> {
        let (certificate, key) = self.sign(&user.name, user.group.as_deref(), Vec::new())?;
        let name = user.file_name();
        Ok([self.write(&format!("{name}.crt"), &certificate)?, self.write(&format!("{name}.key"), &key)?])
    }

    /// A certificate for clients and servers, and its key, both PEM.
    fn sign(&self, common_name: &str, organisation: Option<&str>, names: Vec<SanType>) -> Result<(String, String)> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(common_name, organisation);
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().context("making a key")?;
        let certificate =
            params.signed_by(&key, &self.issuer).with_context(|| format!("making a certificate for {common_name}"))?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// Replaces a file that only root reads.
    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let (path, new) = (self.file(name), self.file(&format!("{name}.new")));
        let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

/// What Kubernetes takes for a user (common name) and a group (organisation).
fn name(common_name: &str, organisation: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organisation) = organisation {
        name.push(DnType::OrganizationName, organisation);
    }
    name.push(DnType::CommonName, common_name);
    name
}

/// All that the API server is called: on its wire, through the relay, and as a service.
fn server_names() -> Result<Vec<SanType>> {
    let host = super::network::HOST;
    let mut addresses: Vec<IpAddr> =
        vec![Ipv4Addr::LOCALHOST.into(), control_plane_v4(host).into(), control_plane_v6(host).into()];
    addresses.extend(vips(1));
    let mut names: Vec<_> = addresses.into_iter().map(SanType::IpAddress).collect();
    for dns in ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"] {
        names.push(SanType::DnsName(dns.try_into().context("a name")?));
    }
    Ok(names)
}
