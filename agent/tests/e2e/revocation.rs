//! Certificates that are revoked under the agents' eyes.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use testbed::{CertificateFiles, pace::patience};

use crate::{
    certificates::{Forge, Leaf},
    world::{Stage, World, app, app_error, at, eventually, live, serve, wait_counter},
};

/// Replaces the file as a whole.
fn put(file: &Path, text: impl AsRef<[u8]>) -> Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(new, file).context("replacing the list")
}

/// Agents with certificates from files, and those of client and server.
fn world(label: &str, list: &Path, forge: &Forge) -> Result<(World, PathBuf, PathBuf)> {
    let mut stage = Stage::new(label)?;
    stage.mesh.ca_dir = None;
    let mut certificates = Vec::new();
    for name in ["client", "server"] {
        let files = forge.leaf(&Leaf::good(name))?;
        certificates.push(files.certificate.clone());
        let enroll = stage.mesh.workload(name).enroll.as_mut().context("enrolled")?;
        enroll.certificate = Some(CertificateFiles { chain: files.certificate, key: files.key, roots: files.roots });
    }
    let world = stage.start_with(&["--crl-file", list.to_str().context("a path")?])?;
    let [client, server] = <[PathBuf; 2]>::try_from(certificates).ok().context("two certificates")?;
    Ok((world, client, server))
}

/// The server's agent learns that the client is revoked, then the client's agent that the server is.
#[test]
fn a_revocation_ends_what_is_open_and_lets_nothing_new_in() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let list = directory.path().join("crl.pem");
    let forge = Forge::foreign(directory.path())?;
    put(&list, forge.revoke(1, &[])?)?;
    let (world, client, server) = world("revoke", &list, &forge)?;
    let _echo = serve(&world.server, 8080, &[])?;
    let to = at(world.server.ipv4(), 8080);
    let mut number = 1;
    for revoked in [&client, &server] {
        let held = world.client.app(&["hold", &to, "--count", "20", "--exchange"])?;
        ensure!(held.wait_json("held", patience(Duration::from_secs(30)))?["held"] == 20);
        ensure!(live(&world.b)? == 20, "{}", world.b.connections()?);
        number += 1;
        let start = Instant::now();
        put(&list, forge.revoke(number, &[revoked.as_path()])?)?;
        let judge = if revoked == &client { &world.b } else { &world.a };
        judge.wait_connections(patience(Duration::from_secs(1)), <[_]>::is_empty)?;
        println!("gone {:?} after the list was there", start.elapsed());
        let ends = held.output(patience(Duration::from_secs(30)))?.last_json()?;
        ensure!(ends["endings"]["ECONNRESET"] == 20, "{ends}");
        // Sessions of both are resumed everywhere else.
        ensure!(app_error(&world.client, &["request", &to])? == "ECONNRESET");
        wait_counter(judge, "refused.certificate-revoked", 1)?;

        // What is no list takes nothing back.
        put(&list, "-----BEGIN X509 CRL-----\ngarbage\n-----END X509 CRL-----\n")?;
        judge.wait_status(Duration::from_secs(20), |status| {
            let problems = status["revocation"]["problems"].to_string();
            Ok(status["revocation"]["revoked"] == 1 && problems.contains("stay in force"))
        })?;
        ensure!(app_error(&world.client, &["request", &to])? == "ECONNRESET");
        // A newer list does.
        number += 1;
        put(&list, forge.revoke(number, &[])?)?;
        eventually(Duration::from_secs(20), || app(&world.client, &["request", &to]).map(drop))?;
    }
    Ok(())
}

#[test]
fn an_agent_whose_list_cannot_be_read_does_not_start() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let forge = Forge::foreign(directory.path())?;
    for content in [None, Some("garbage")] {
        let list = directory.path().join("crl.pem");
        if let Some(content) = content {
            put(&list, content)?;
        }
        let refused = world("norevoke", &list, &forge).err().context("it started")?;
        let said = format!("{refused:#}");
        ensure!(said.contains("crlFile") && said.contains("take crlFile (CRL_PATH) out"), "{said}");
    }
    Ok(())
}
