//! What earlier agents left.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::Arc,
};

use super::{
    CaptureError, EnrollError, Inner, cleanup, enroll,
    kept::{self, Reason},
    links,
    netns::Netns,
    object, pins, records,
};

/// See [`super::Capture::collect_garbage`].
pub async fn collect(inner: &Arc<Inner>) {
    take_over_moved(inner).await;
    if let Err(e) = take_over_older_versions(inner).await {
        tracing::error!(error = %e, "pins of an older version stay; connections of its pods are refused");
    }
    if let Err(e) = links::remove_dead(inner.objects.layout(), None) {
        tracing::warn!(error = %e, "cannot remove pins of interfaces that are gone");
    }
    if let Err(e) = inner.node_guard.sweep().await {
        tracing::warn!(error = %e, "cannot forget interfaces of the node that are gone");
    }
    keep_orphans(inner).await;
}

/// Keeps the guards of older versions on interfaces that have been moved out of their pods'
/// namespaces.
async fn take_over_moved(inner: &Inner) {
    for older in pins::versions(&inner.options.pin_root, Some(object::ABI_HASH)).unwrap_or_default() {
        let captured: BTreeSet<u64> = cleanup::captured(&older).unwrap_or_default().into_iter().collect();
        let namespaces = super::blocking(move || find(&captured)).await;
        if let Err(e) = inner.node_guard.take_over(older, namespaces).await {
            tracing::error!(error = %e, "an interface that left its pod may not be guarded any more");
        }
    }
}

/// Keeps namespaces that are in the maps and belong to no pod: that nobody knows them is no reason
/// to open them.
async fn keep_orphans(inner: &Arc<Inner>) {
    let orphans: BTreeMap<u64, u32> = {
        let registry = inner.registry();
        let tables = inner.maps.tables();
        let orphans = registry.orphans(tables.pods());
        orphans.into_iter().filter_map(|netns| Some((netns, tables.pods().get(&netns)?.pod_id))).collect()
    };
    let found = found(orphans.keys().copied().collect()).await;
    for (cookie, pod_id) in orphans {
        let record = records::read(inner.objects.layout(), cookie).unwrap_or_default();
        let pod = record.key().map_or_else(|| "unknown".to_owned(), |key| key.to_string());
        tracing::warn!(%pod, netns = cookie, "kept: {}", Reason::Orphaned);
        let netns = found.get(&cookie).cloned();
        if let Err(error) = kept::adopt(inner, record, pod_id, cookie, netns, Reason::Orphaned).await {
            tracing::error!(%pod, netns = cookie, %error, "the pod is kept, but not all of it could be closed");
        }
    }
    // Numbers without a namespace are what is left of a release that was cut short.
    let ids = {
        let registry = inner.registry();
        let tables = inner.maps.tables();
        registry.orphan_ids(tables.pods())
    };
    for id in ids {
        match enroll::detach(inner, None, id).await {
            Ok(()) => inner.registry().free(id),
            Err(e) => tracing::error!(pod = id, error = %e, "cannot remove tc programs or rules"),
        }
    }
}

/// Keeps the pods of older versions that nobody has enrolled in this one, then removes those
/// versions. What cannot be closed in this version stays closed by the old one.
async fn take_over_older_versions(inner: &Arc<Inner>) -> Result<(), EnrollError> {
    for layout in pins::versions(&inner.options.pin_root, Some(object::ABI_HASH))? {
        let captured = cleanup::captured(&layout).map_err(|source| CaptureError::Path {
            action: "read the captured namespaces of",
            path: layout.dir().into(),
            source,
        })?;
        let strangers: BTreeSet<u64> = captured.into_iter().filter(|netns| !inner.registry().has(*netns)).collect();
        let found = found(strangers.clone()).await;
        for cookie in strangers {
            let record = records::read(&layout, cookie).unwrap_or_default();
            let id = inner.registry().reserve()?;
            kept::adopt(inner, record, id, cookie, found.get(&cookie).cloned(), Reason::Orphaned).await?;
        }
        tracing::info!(directory = %layout.dir().display(), "removing pins of an older version");
        cleanup::remove_version(&layout)?;
    }
    Ok(())
}

/// The namespaces with these cookies, as far as something leads there.
async fn found(wanted: BTreeSet<u64>) -> HashMap<u64, Arc<Netns>> {
    if wanted.is_empty() {
        return HashMap::new();
    }
    let found = tokio::task::spawn_blocking(move || find(&wanted)).await.unwrap_or_default();
    found.into_iter().map(|netns| (netns.cookie(), netns)).collect()
}

/// The namespaces with these cookies, among those that have a name or a process.
pub fn find(wanted: &BTreeSet<u64>) -> Vec<Arc<Netns>> {
    namespaces().filter(|netns| wanted.contains(&netns.cookie())).take(wanted.len()).collect()
}

/// Every network namespace that has a name or a process, the agent's own left out.
pub fn all() -> Vec<Arc<Netns>> {
    namespaces().collect()
}

/// Each of them once. None is opened before somebody asks for it.
fn namespaces() -> impl Iterator<Item = Arc<Netns>> {
    let mut seen = BTreeSet::new();
    candidates().filter_map(move |path| {
        let meta = fs::metadata(&path).ok()?;
        seen.insert((meta.dev(), meta.ino())).then(|| Netns::open(&path).ok())?
    })
}

/// Named namespaces, and those of processes.
fn candidates() -> impl Iterator<Item = PathBuf> {
    let named = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|e| e.path());
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|e| {
        let is_pid = e.file_name().to_str().is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
        is_pid.then(|| e.path().join("ns/net"))
    });
    named.chain(processes)
}
