//! What earlier agents left.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, path::PathBuf, sync::Arc};

use super::{Inner, cleanup, enroll, links, loader, netns::Netns, object, pins, routes, tc};

/// See [`super::Capture::collect_garbage`].
pub async fn collect(inner: &Inner) {
    take_over(inner).await;
    if let Err(e) = loader::remove_older_versions(&inner.options.pin_root) {
        tracing::error!(error = %e, "cannot remove pins of an older version; connections of its pods are refused");
    }
    if let Err(e) = links::remove_dead(inner.objects.layout(), None) {
        tracing::warn!(error = %e, "cannot remove pins of interfaces that are gone");
    }
    if let Err(e) = inner.node_guard.sweep().await {
        tracing::warn!(error = %e, "cannot forget interfaces of the node that are gone");
    }
    collect_orphans(inner).await;
}

/// Keeps the guards of older versions on interfaces that have been moved out of their pods'
/// namespaces.
async fn take_over(inner: &Inner) {
    for older in pins::versions(&inner.options.pin_root, Some(object::ABI_HASH)).unwrap_or_default() {
        let captured: BTreeSet<u64> = cleanup::captured(&older).into_iter().collect();
        let namespaces = super::blocking(move || find(&captured)).await;
        if let Err(e) = inner.node_guard.take_over(older, namespaces).await {
            tracing::error!(error = %e, "an interface that left its pod may not be guarded any more");
        }
    }
}

/// Gives namespaces that are in the maps and belong to no pod plain traffic back.
async fn collect_orphans(inner: &Inner) {
    let (namespaces, ids) = {
        let registry = inner.registry();
        let tables = inner.maps.tables();
        (registry.orphans(tables.pods()), registry.orphan_ids(tables.pods()))
    };
    discard(inner, namespaces, ids).await;
}

/// Gives these namespaces plain traffic back and frees these pods' numbers, in the order of un-enrolment.
pub async fn discard(inner: &Inner, namespaces: BTreeSet<u64>, ids: BTreeSet<u32>) {
    for &netns in &namespaces {
        tracing::info!(netns, "removing a pod that is not configured any more");
        if let Err(e) = inner.maps.tables().release(netns) {
            tracing::error!(netns, error = %e, "cannot turn capture off");
        }
    }
    let mut unpinned = BTreeSet::new();
    for id in ids {
        let released = match tc::unpin(&inner.objects, id) {
            Ok(()) => inner.node_guard.release(id).await,
            Err(e) => Err(e),
        };
        match released {
            Ok(()) => {
                unpinned.insert(id);
            }
            Err(e) => tracing::error!(pod = id, error = %e, "cannot remove tc programs"),
        }
    }
    if !namespaces.is_empty() {
        restore(namespaces).await;
    }
    for id in unpinned {
        match enroll::forget(inner, id).await {
            Ok(()) => inner.registry().free(id),
            Err(e) => tracing::error!(pod = id, error = %e, "cannot remove rules"),
        }
    }
}

/// Removes filters and reply routes in those of these namespaces that still can be found. A namespace that nothing
/// names and no process is in cannot; it has no traffic either.
async fn restore(wanted: BTreeSet<u64>) {
    let found = tokio::task::spawn_blocking(move || find(&wanted)).await.unwrap_or_default();
    for netns in found {
        if let Err(e) = tc::detach_filters(&netns).await {
            tracing::warn!(namespace = %netns.path().display(), error = %e, "cannot remove tc filters");
        }
        routes::remove(&netns).await;
    }
}

/// The namespaces with these cookies, among those that have a name or a process.
pub fn find(wanted: &BTreeSet<u64>) -> Vec<Arc<Netns>> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for path in candidates() {
        let Ok(meta) = fs::metadata(&path) else { continue };
        if found.len() < wanted.len()
            && seen.insert((meta.dev(), meta.ino()))
            && let Ok(netns) = Netns::open(&path)
            && wanted.contains(&netns.cookie())
        {
            found.push(netns);
        }
    }
    found
}

/// Every network namespace that has a name or a process, the agent's own left out.
pub fn all() -> Vec<Arc<Netns>> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for path in candidates() {
        if let Ok(meta) = fs::metadata(&path)
            && seen.insert((meta.dev(), meta.ino()))
            && let Ok(netns) = Netns::open(&path)
        {
            found.push(netns);
        }
    }
    found
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
