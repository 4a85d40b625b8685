//! Secrets stay out, whatever happens to a part.

use std::{collections::BTreeMap, fs, io::Read as _, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::anyhow;
use flate2::read::GzDecoder;
use serde_json::json;

use super::{archive::Archive, redact};

const PEM: &str = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIBkg4LVWM9nuwNSk3yByxZpYRTBnVJk5GkMu\nb64secretb64secret==\n-----END EC PRIVATE KEY-----";

#[test]
fn what_looks_like_a_secret_is_replaced_wherever_it_stands() {
    for (text, secret) in [
        (format!("before {PEM} after"), "b64secret"),
        (serde_json::to_string(&PEM).unwrap(), "b64secret"),
        (PEM[..60].to_owned(), "MHcCAQEE"),
        (PEM[40..].to_owned(), "b64secret"),
        ("eyJhbGciOiJSUzI1NiIs.eyJzdWIiOiJzeXN0ZW0.c2lnbmF0dXJl".to_owned(), "c2lnbmF0dXJl"),
        ("Authorization: Bearer abcdefghijklm".to_owned(), "abcdefghijklm"),
        ("password=hunter2 user=x".to_owned(), "hunter2"),
        ("{\"api_key\": \"hunter2\"}".to_owned(), "hunter2"),
    ] {
        let redacted = redact::text(&text);
        assert!(!redacted.contains(secret) && redacted.contains("[redacted"), "{text} -> {redacted}");
    }
    for harmless in ["spiffe://cluster.local/ns/a/sa/b", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----"]
    {
        assert_eq!(redact::text(harmless), harmless);
    }
}

#[test]
fn fields_are_judged_by_their_names() {
    let mut value = json!({
        "node": "a",
        "issuer": { "spire": { "joinToken": "t0k3n", "socket": "/run/x" } },
        "list": [{ "client_secret": ["s3cret"] }, { "Private-Key": "k3y" }],
        "files": { "certificate": "/c.pem", "key": "/k.pem" },
        "passwordless": true
    });
    redact::fields(&mut value);
    let text = value.to_string();
    for secret in ["t0k3n", "s3cret", "k3y"] {
        assert!(!text.contains(secret), "{text}");
    }
    assert_eq!((&value["node"], &value["files"]["key"]), (&json!("a"), &json!("/k.pem")), "paths are no secrets");
    assert_eq!(value["passwordless"], true);
}

fn unpack(path: &Path) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(GzDecoder::new(fs::File::open(path).unwrap())).entries().unwrap() {
        let mut entry = entry.unwrap();
        assert_eq!(entry.header().mode().unwrap(), 0o600);
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        files.insert(name, text);
    }
    files
}

#[test]
fn a_part_that_fails_keeps_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.tar.gz");
    let mut archive = Archive::create(&path, "bundle").unwrap();
    archive.text("log.txt", Ok(format!("x\n{PEM}\n"))).unwrap();
    archive.json::<()>("agent/status.json", Err(anyhow!("no agent; {PEM}"))).unwrap();
    archive.text("long.txt", Ok("é".repeat(9 * 1024 * 1024))).unwrap();
    let (parts, size) = archive.finish().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(&path).unwrap().len(), size);
    assert_eq!(parts.iter().map(|p| p.cut).collect::<Vec<_>>(), [false, false, true]);
    let files = unpack(&path);
    let names: Vec<_> = files.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["bundle/agent/status.json.error.txt", "bundle/log.txt", "bundle/long.txt", "bundle/manifest.json"]
    );
    assert!(files["bundle/agent/status.json.error.txt"].starts_with("no agent; [redacted private key]"));
    for (name, text) in &files {
        assert!(!text.contains("b64secret"), "{name}: {text:.200}");
    }
}

#[test]
fn what_is_there_is_not_overwritten_and_half_an_archive_not_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.tar.gz");
    fs::write(&path, "precious").unwrap();
    let error = Archive::create(&path, "bundle").err().unwrap().to_string();
    assert!(error.contains("exists already; name another --file"), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let other = dir.path().join("c.tar.gz");
    drop(Archive::create(&other, "bundle").unwrap());
    assert!(!other.exists());
}
