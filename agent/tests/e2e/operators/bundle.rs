//! `underpass debug bundle`: complete, private and without secrets.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use serde_json::Value;

use super::run;
use crate::{
    certificates::Forge,
    world::{World, at, serve},
};

/// Makes a bundle and reads it: files by name, without the directory they are in.
fn bundle(world: &World, name: &str, arguments: &[&str]) -> Result<BTreeMap<String, Vec<u8>>> {
    let file = world.bed.dir().join(name);
    let path = file.to_str().context("UTF-8")?;
    let (code, stdout, stderr) =
        run(&world.a, &[&["debug", "bundle", "-o", "json", "--file", path], arguments].concat())?;
    ensure!(code == 0, "{code} {stdout}{stderr}");
    let report: Value = serde_json::from_str(&stdout)?;
    let metadata = fs::metadata(&file)?;
    ensure!(metadata.permissions().mode() & 0o7777 == 0o600, "{:o}", metadata.permissions().mode());
    ensure!(report["size"] == metadata.len(), "{report}");
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(GzDecoder::new(File::open(&file)?)).entries()? {
        let mut entry = entry?;
        let name: std::path::PathBuf = entry.path()?.components().skip(1).collect();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        files.insert(name.to_string_lossy().into_owned(), bytes);
    }
    let listed = report["parts"].as_array().context("parts")?;
    ensure!(listed.len() + 1 == files.len(), "the manifest is beside what it lists: {report} {:?}", files.keys());
    Ok(files)
}

fn json(files: &BTreeMap<String, Vec<u8>>, name: &str) -> Result<Value> {
    let bytes = files.get(name).with_context(|| format!("no {name} in {:?}", files.keys()))?;
    serde_json::from_slice(bytes).with_context(|| name.to_owned())
}

/// Every form in which key bytes could be in a text: lines of PEM, hexadecimal, and as they are.
fn forms(pem_file: &Path) -> Result<Vec<Vec<u8>>> {
    let text = fs::read_to_string(pem_file)?;
    let mut forms: Vec<Vec<u8>> =
        text.lines().filter(|l| l.len() > 20 && !l.starts_with('-')).map(|l| l.as_bytes().to_vec()).collect();
    let der = pem::parse(&text)?.into_contents();
    // The middle of a PKCS#8 key is the secret; its beginning is the same in all of them.
    let secret = &der[der.len() / 3..der.len() / 3 + 16];
    let hex = secret.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().concat();
    forms.extend([secret.to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes()]);
    Ok(forms)
}

fn without(files: &BTreeMap<String, Vec<u8>>, secrets: &[Vec<u8>]) -> Result<()> {
    for (name, bytes) in files {
        for secret in secrets {
            let found = bytes.windows(secret.len()).any(|w| w == secret);
            ensure!(!found, "a secret is in {name}: {:?}", String::from_utf8_lossy(secret));
        }
    }
    Ok(())
}

#[test]
fn a_bundle_is_complete_and_holds_no_secret() -> Result<()> {
    let mut world = World::new("bundle")?;
    let _echo = serve(&world.server, 8080, &[])?;
    let held = world.client.app(&["expect-reset", &at(world.server.ipv4(), 8080)])?;
    held.wait_json("established", Duration::from_secs(10))?;

    // A log as careless programs write it, with a key of the mesh's own.
    let ca_key = world.bed.dir().join("ca/ca.key");
    let leaf = Forge::of(&world.bed)?.leaf(&crate::certificates::Leaf::good("client"))?;
    let log = world.bed.dir().join("agent.log");
    let token = "eyJhbGciOiJSUzI1NiIs.eyJzdWIiOiJzeXN0ZW0.c2lnbmF0dXJl";
    let careless =
        format!("{}\nline of the log\ntoken {token}\n{}", fs::read_to_string(&ca_key)?, fs::read_to_string(&leaf.key)?);
    fs::write(&log, careless)?;
    let mut secrets = forms(&ca_key)?;
    secrets.extend(forms(&leaf.key)?);
    secrets.push(token.into());

    // The search finds what is there.
    let control = BTreeMap::from([("log".to_owned(), fs::read(&log)?)]);
    ensure!(without(&control, &secrets).is_err(), "the search is blind");

    let files = bundle(&world, "live.tar.gz", &["--log-file", log.to_str().context("UTF-8")?])?;
    without(&files, &secrets)?;
    let text = |name: &str| files.get(name).map(|b| String::from_utf8_lossy(b).into_owned()).context(name.to_owned());
    ensure!(text("log.txt")?.contains("line of the log"), "{}", text("log.txt")?);
    ensure!(json(&files, "agent/connections.json")?["total"] == 1);
    ensure!(json(&files, "agent/certificates.json")?["certificates"][0]["certificate"]["serial"].is_string());
    ensure!(json(&files, "agent/status.json")?["pods"][0]["workload"] == "default/client");
    ensure!(json(&files, "check.json")?["can_run"] == true);
    ensure!(json(&files, "bpf/PODS.json")?["entries"][0]["key"]["workload"] == "default/client");
    ensure!(json(&files, "manifest.json")?.as_array().is_some_and(|parts| parts.iter().all(|p| p["error"].is_null())));
    ensure!(text("config.yaml")?.contains("trustDomain: cluster.local"), "{}", text("config.yaml")?);
    let pod = text("pods/default_client.txt")?;
    for part in ["FwMark(1337)", "interface ", "net/ipv4/tcp_fwmark_accept = 1", "/proc/thread-self/net/dev", "eth0"] {
        ensure!(pod.contains(part), "{part} in {pod}");
    }
    for name in [
        "agent/workloads.json",
        "agent/services.json",
        "agent/policies.json",
        "agent/counters.json",
        "bpf/programs.json",
        "bpf/maps.json",
    ] {
        json(&files, name)?;
    }

    // Dead, it has to come from what is pinned and written down.
    world.a.kill()?;
    let files = bundle(&world, "dead.tar.gz", &["--log-file", "/nonexistent"])?;
    without(&files, &secrets)?;
    let text = |name: &str| files.get(name).map(|b| String::from_utf8_lossy(b).into_owned()).context(name.to_owned());
    ensure!(text("agent/status.json.error.txt")?.contains("no agent is running"));
    ensure!(text("log.txt.error.txt")?.contains("/nonexistent"));
    ensure!(!files.keys().any(|name| name.starts_with("agent/connections")), "{:?}", files.keys());
    ensure!(json(&files, "bpf/PODS.json")?["entries"][0]["key"]["workload"] == "default/client");
    ensure!(text("pods/default_client.txt")?.contains("FwMark(1337)"));

    let file = world.bed.dir().join("dead.tar.gz");
    let (code, _, stderr) = run(&world.a, &["debug", "bundle", "--file", file.to_str().context("UTF-8")?])?;
    ensure!(code == 1 && stderr.contains("exists already; name another --file"), "{code} {stderr}");
    Ok(())
}
