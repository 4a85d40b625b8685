//! The copy of everything the API server said, for a start without it.

use std::{io, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    cluster::Cluster,
    records::{ConfiguredRecord, Key, NamespaceRecord, NodeRecord, PodRecord, ServiceRecord, SliceRecord},
    table::Table,
};
use crate::sources::last_good::Copy;

/// Names the format; a copy in another one is not read.
const FORMAT: u32 = 1;
/// A cluster of 50,000 pods takes about 25 MiB.
const COPY: Copy = Copy { name: "last-good-cluster.json", longest: 256 * 1024 * 1024 };

#[derive(Serialize, Deserialize)]
struct Saved {
    format: u32,
    node: Arc<str>,
    pods: Vec<(Key, Arc<PodRecord>)>,
    namespaces: Vec<(Key, Arc<NamespaceRecord>)>,
    nodes: Vec<(Key, Arc<NodeRecord>)>,
    services: Vec<(Key, Arc<ServiceRecord>)>,
    slices: Vec<(Key, Arc<SliceRecord>)>,
    policies: Vec<(Key, Arc<ConfiguredRecord>)>,
    authentications: Vec<(Key, Arc<ConfiguredRecord>)>,
}

/// Writes the copy. Blocks on the disk.
pub(super) fn save(state_dir: &Path, node: &str, cluster: &Cluster) -> io::Result<()> {
    fn all<R>(table: &Table<Key, R>) -> Vec<(Key, Arc<R>)>
    where
        R: PartialEq,
    {
        table.iter().map(|(key, record)| (key.clone(), Arc::clone(record))).collect()
    }
    let saved = Saved {
        format: FORMAT,
        node: node.into(),
        pods: all(&cluster.pods),
        namespaces: all(&cluster.namespaces),
        nodes: all(&cluster.nodes),
        services: all(&cluster.services),
        slices: all(&cluster.slices),
        policies: all(&cluster.policies),
        authentications: all(&cluster.authentications),
    };
    COPY.save(state_dir, &serde_json::to_string(&saved)?)
}

/// Reads the copy of the node of this name.
pub(super) fn restore(state_dir: &Path, node: &str) -> io::Result<Cluster> {
    let saved: Saved = serde_json::from_str(&COPY.read(state_dir)?)?;
    if saved.format != FORMAT || *saved.node != *node {
        let problem =
            format!("it has format {} of node {:?}; format {FORMAT} of {node:?} is read", saved.format, saved.node);
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    Ok(Cluster {
        pods: Table::restored(saved.pods),
        namespaces: Table::restored(saved.namespaces),
        nodes: Table::restored(saved.nodes),
        services: Table::restored(saved.services),
        slices: Table::restored(saved.slices),
        policies: Table::restored(saved.policies),
        authentications: Table::restored(saved.authentications),
        ..Cluster::default()
    })
}
