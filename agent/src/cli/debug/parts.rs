//! What goes into a bundle. Each part is bounded, and none that fails keeps the others out.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::{BundleArgs, archive::Archive, host, redact};
use crate::{
    admin::{api::Status, query::ConnectionQuery},
    capture::{
        inspect::{self, NotListed},
        object::ABI_HASH,
    },
    cli::{agent::Asker, bpf, check, output},
    sources::file,
};

/// Most workloads, services and connections.
const LISTED: usize = 10_000;
/// Most entries of each map.
const ENTRIES: usize = 10_000;
/// Most pods whose network is described.
const PODS: usize = 256;
/// Bytes of the end of the log.
const LOG: u64 = 1024 * 1024;

/// Collects everything. Fails only when the archive cannot be written.
pub(super) fn collect(args: &BundleArgs, archive: &mut Archive) -> anyhow::Result<()> {
    archive.json("version.json", Ok(json!({ "version": env!("CARGO_PKG_VERSION"), "abi": ABI_HASH })))?;
    archive.json("check.json", Ok(check::report(args.cgroup.as_deref(), &args.pin_root)))?;
    archive.text("host/kernel.txt", Ok(host::kernel()))?;
    archive.text("host/settings.txt", Ok(host::settings()))?;
    archive.text("config.yaml", config(&args.state_dir))?;
    if let Some(path) = &args.log_file {
        archive.text("log.txt", log_end(path))?;
    }
    let agent = args.agent.asker()?;
    let status = agent.ask(async |a| a.status().await);
    let namespaces = namespaces(status.as_ref().ok(), &args.state_dir);
    let answers = status.is_ok();
    archive.json("agent/status.json", status)?;
    // One that does not answer is asked once: it may take its whole time not to.
    if answers {
        ask(&agent, archive)?;
    }
    pins(args, archive)?;
    for (name, path) in namespaces.into_iter().take(PODS) {
        let text = agent.run(inspect::namespace::describe(&path)).map_err(anyhow::Error::msg);
        archive.text(&format!("pods/{}.txt", file_name(&name)), text)?;
    }
    Ok(())
}

fn ask(agent: &Asker, archive: &mut Archive) -> anyhow::Result<()> {
    archive.json("agent/counters.json", agent.ask(async |a| a.counters().await))?;
    archive.json("agent/workloads.json", agent.ask(async |a| a.workloads(LISTED).await))?;
    archive.json("agent/services.json", agent.ask(async |a| a.services(LISTED).await))?;
    archive.json("agent/policies.json", agent.ask(async |a| a.policies().await))?;
    archive.json("agent/certificates.json", agent.ask(async |a| a.certificates().await))?;
    let query = ConnectionQuery { limit: Some(LISTED), ..ConnectionQuery::default() };
    archive.json("agent/connections.json", agent.ask(async |a| a.connections(&query).await))
}

fn pins(args: &BundleArgs, archive: &mut Archive) -> anyhow::Result<()> {
    archive.json("bpf/programs.json", inspect::programs(&args.pin_root).map_err(Into::into))?;
    let maps = inspect::maps(&args.pin_root);
    let dumped: Vec<String> = maps
        .iter()
        .flat_map(|all| &all.maps)
        .filter(|m| m.own && NotListed::of(&m.map).is_none())
        .map(|m| m.map.clone())
        .collect();
    archive.json("bpf/maps.json", maps.map_err(Into::into))?;
    let names = bpf::names(&args.pin_root, &args.state_dir);
    for map in dumped {
        let dump = inspect::dump(&args.pin_root, &map, ENTRIES, &names);
        archive.json(&format!("bpf/{}.json", file_name(&map)), dump.map_err(Into::into))?;
    }
    Ok(())
}

/// The configuration that was last accepted, as it is written but for secrets.
fn config(state_dir: &Path) -> anyhow::Result<String> {
    let text = file::last_good(state_dir).with_context(|| {
        format!("reading the last good configuration in {}; name another --state-dir", state_dir.display())
    })?;
    let mut value: Value = serde_saphyr::from_str(&text).context("the last good configuration is not YAML")?;
    redact::fields(&mut value);
    output::yaml(&value)
}

/// The end of the log, from the beginning of a line.
fn log_end(path: &Path) -> anyhow::Result<String> {
    let failed = || format!("reading --log-file {}", path.display());
    let mut file = File::open(path).with_context(failed)?;
    let length = file.metadata().with_context(failed)?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG))).with_context(failed)?;
    let mut end = Vec::new();
    file.take(LOG).read_to_end(&mut end).with_context(failed)?;
    let text = String::from_utf8_lossy(&end);
    let whole = if length > LOG { text.split_once('\n').map_or("", |(_, rest)| rest) } else { &text };
    if whole.is_empty() {
        bail!("{} is empty", path.display());
    }
    Ok(whole.to_owned())
}

/// Names and network namespaces of the pods that the agent, or else its configuration, enrols.
fn namespaces(status: Option<&Status>, state_dir: &Path) -> Vec<(String, PathBuf)> {
    let mut all: Vec<_> = match status {
        Some(status) => status.pods.iter().map(|p| (p.workload.clone(), PathBuf::from(&p.netns))).collect(),
        None => bpf::last_good(state_dir)
            .iter()
            .flat_map(crate::mesh::Snapshot::local_workloads)
            .filter_map(|w| Some((w.key.to_string(), w.local.as_ref()?.netns.name().to_owned())))
            .collect(),
    };
    all.sort();
    all
}

/// A name that is one component of a path and harmless to programs that list it.
fn file_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '_' };
    name.chars().take(128).map(plain).collect()
}
