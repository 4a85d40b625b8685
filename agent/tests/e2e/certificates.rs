//! Certificates good and bad, and openssl as a peer that is not Underpass.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
};
use testbed::{Pod, Process, Testbed};
use time::OffsetDateTime;
use underpass::{identity::LocalIssuer, mesh::TrustDomain};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use crate::world::{Stage, app, app_error, at, counter, serve};

/// Signs certificates with the testbed's CA, or with one that nobody trusts.
pub struct Forge {
    dir: PathBuf,
    certificate: String,
    key: String,
}

/// What a leaf says.
pub struct Leaf {
    pub sans: Vec<SanType>,
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    pub valid: (i64, i64),
}

/// PEM files.
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub roots: PathBuf,
}

impl Leaf {
    /// What the agents' own CA would sign for service account `account`.
    pub fn good(account: &str) -> Self {
        Self::uri(&format!("spiffe://cluster.local/ns/default/sa/{account}"))
    }

    pub fn uri(uri: &str) -> Self {
        Self {
            sans: vec![SanType::URI(uri.try_into().expect("ASCII"))],
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
            valid: (-60, 3600),
        }
    }
}

impl Forge {
    /// With the CA that the agents of this testbed share; an agent has to have run.
    pub fn of(bed: &Testbed) -> Result<Self> {
        let dir = bed.dir().join("ca");
        let read = |name: &str| fs::read_to_string(dir.join(name)).with_context(|| format!("reading {name} of the CA"));
        Ok(Self { certificate: read("ca.crt")?, key: read("ca.key")?, dir: bed.dir().to_path_buf() })
    }

    /// With a CA of its own.
    pub fn foreign(dir: &Path) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        ca.distinguished_name.push(DnType::CommonName, "another CA");
        Ok(Self { certificate: ca.self_signed(&key)?.pem(), key: key.serialize_pem(), dir: dir.to_path_buf() })
    }

    /// A list with this number of the certificates in these files, PEM.
    pub fn revoke(&self, number: u64, certificates: &[&Path]) -> Result<String> {
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?;
        let now = OffsetDateTime::now_utc();
        let revoked = |file: &&Path| {
            let pem = pem::parse(fs::read(file)?)?;
            let (_, leaf) = X509Certificate::from_der(pem.contents())?;
            Ok(RevokedCertParams {
                serial_number: leaf.raw_serial().to_vec().into(),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            })
        };
        let params = CertificateRevocationListParams {
            this_update: now,
            next_update: now + time::Duration::HOUR,
            crl_number: number.into(),
            issuing_distribution_point: None,
            revoked_certs: certificates.iter().map(revoked).collect::<Result<_>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&issuer)?.pem()?)
    }

    pub fn leaf(&self, leaf: &Leaf) -> Result<Files> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names.clone_from(&leaf.sans);
        params.extended_key_usages.clone_from(&leaf.usages);
        let now = OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::seconds(leaf.valid.0);
        params.not_after = now + time::Duration::seconds(leaf.valid.1);
        let certificate = params.signed_by(&key, &issuer)?.pem();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let write = |name: &str, text: &str| -> Result<PathBuf> {
            let path = self.dir.join(format!("forged-{number}.{name}"));
            fs::write(&path, text)?;
            Ok(path)
        };
        Ok(Files {
            certificate: write("crt", &certificate)?,
            key: write("key", &key.serialize_pem())?,
            roots: write("roots", &self.certificate)?,
        })
    }
}

/// openssl as a client of `server`'s tunnel port.
pub fn s_client(from: &Pod, server: &Pod, files: &Files, arguments: &[&str]) -> Result<Process> {
    let to = at(server.ipv4(), 15008);
    let (certificate, key) = (files.certificate.display().to_string(), files.key.display().to_string());
    let mut command =
        vec!["openssl", "s_client", "-connect", &to, "-tls1_3", "-quiet", "-cert", &certificate, "-key", &key];
    command.extend(arguments);
    from.spawn(&command)
}

#[test]
fn files_issuer_serves_and_an_expired_certificate_fails_closed() -> Result<()> {
    let mut stage = Stage::new("files")?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let to = at(stage.server.ipv4(), 8080);
    let forge = Forge::foreign(stage.bed.dir())?;
    stage.mesh.ca_dir = None;
    for name in ["client", "server"] {
        let mut leaf = Leaf::good(name);
        if name == "client" {
            // Short: it expires while the agents run.
            leaf.valid = (-60, 12);
        }
        let files = forge.leaf(&leaf)?;
        let enroll = stage.mesh.workload(name).enroll.as_mut().context("enrolled")?;
        enroll.certificate =
            Some(testbed::CertificateFiles { chain: files.certificate, key: files.key, roots: files.roots });
    }
    let world = stage.start()?;
    app(&world.client, &["request", &to])?;
    let path = world.mesh.workloads[0].enroll.as_ref().and_then(|e| e.certificate.as_ref()).context("certificate")?;
    let (certificate, key) = (path.chain.clone(), path.key.clone());
    crate::world::eventually(Duration::from_secs(20), || {
        let error = app_error(&world.client, &["request", &to, "--timeout", "15"])?;
        ensure!(error == "ECONNRESET", "{error}");
        // The first one may have been refused by the peer, when the certificate expired on the way.
        let refused = counter(&world.a, "refused.no-certificate")?;
        ensure!(refused > 0, "{}", world.a.counters()?);
        Ok(())
    })?;
    // New files heal it without a restart.
    let fresh = forge.leaf(&Leaf::good("client"))?;
    fs::rename(&fresh.key, &key)?;
    fs::rename(&fresh.certificate, &certificate)?;
    crate::world::eventually(Duration::from_secs(20), || app(&world.client, &["request", &to]).map(drop))
}

/// Certificates that live for seconds, and a root that is replaced, under connections all the time.
#[test]
fn rotation_in_seconds_breaks_no_connection() -> Result<()> {
    let mut stage = Stage::new("rotate")?;
    stage.mesh.lifetime = "6s".into();
    let world = stage.start()?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let held = world.client.app(&["hold", &to, "--count", "5", "--exchange"])?;
    held.wait_json("held", Duration::from_secs(20))?;
    let serial = |agent: &testbed::Agent| -> Result<String> {
        Ok(agent.status()?["pods"][0]["certificate"]["serial"].as_str().context("serial")?.to_owned())
    };
    // A third agent, so to speak, that shares the CA's directory and replaces its root.
    let domain: TrustDomain = "cluster.local".parse()?;
    let ca = LocalIssuer::open(&world.bed.dir().join("ca"), &domain, Duration::from_secs(6))?;
    let roots = || -> Result<usize> {
        let text = fs::read_to_string(world.bed.dir().join("ca/ca.crt"))?;
        Ok(text.matches("BEGIN CERTIFICATE").count())
    };
    let (mut seen, mut most_roots) = (std::collections::BTreeSet::new(), 1);
    while seen.len() < 6 {
        if seen.len() == 2 && most_roots == 1 {
            ca.rotate()?;
        }
        most_roots = most_roots.max(roots()?);
        seen.insert(serial(&world.a)?);
        app(&world.client, &["parallel", &to, "--count", "20", "--concurrency", "10"])?;
    }
    let alive = held.output(Duration::from_secs(20))?.last_json()?;
    ensure!(alive["alive"] == 5, "{alive}");
    ensure!(most_roots == 2, "the root was not replaced with overlap: {most_roots} at most");
    Ok(())
}
