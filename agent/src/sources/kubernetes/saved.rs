//! The copy of everything the API server said, for a start without it.

use std::{collections::BTreeSet, io, path::Path, sync::Arc};

use serde::{Deserialize, Serialize, Serializer};

use super::{
    cluster::Cluster,
    records::{ConfiguredRecord, Key, NamespaceRecord, NodeRecord, PodRecord, ServiceRecord, SliceRecord},
    status::Kind,
    table::Table,
};
use crate::sources::last_good::Copy;

/// Names the format; a copy in another one is not read.
const FORMAT: u32 = 1;
/// A cluster of 50,000 pods takes about 25 MiB.
const COPY: Copy = Copy { name: "last-good-cluster.json", longest: 256 * 1024 * 1024 };

/// Removes the last good copy.
pub(in crate::sources) fn forget(state_dir: &Path) -> io::Result<()> {
    COPY.forget(state_dir)
}

#[derive(Deserialize)]
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
    #[serde(default)]
    meshed: BTreeSet<Key>,
    /// Kinds that had been listed; those with objects had, too.
    #[serde(default)]
    listed: Vec<Kind>,
}

/// What is written: as above, without a copy of it.
#[derive(Serialize)]
struct Saving<'a> {
    format: u32,
    node: &'a str,
    pods: All<'a, PodRecord>,
    namespaces: All<'a, NamespaceRecord>,
    nodes: All<'a, NodeRecord>,
    services: All<'a, ServiceRecord>,
    slices: All<'a, SliceRecord>,
    policies: All<'a, ConfiguredRecord>,
    authentications: All<'a, ConfiguredRecord>,
    meshed: &'a BTreeSet<Key>,
    listed: Vec<Kind>,
}

/// All records of a table, with their keys.
struct All<'a, R>(&'a Table<Key, R>);

impl<R: Serialize + PartialEq> Serialize for All<'_, R> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter())
    }
}

/// Writes the copy. Blocks on the disk.
pub(super) fn save(state_dir: &Path, node: &str, cluster: &Cluster) -> io::Result<()> {
    let saving = Saving {
        format: FORMAT,
        node,
        pods: All(&cluster.pods),
        namespaces: All(&cluster.namespaces),
        nodes: All(&cluster.nodes),
        services: All(&cluster.services),
        slices: All(&cluster.slices),
        policies: All(&cluster.policies),
        authentications: All(&cluster.authentications),
        meshed: &cluster.meshed,
        listed: cluster.listed().collect(),
    };
    COPY.write(state_dir, |file| Ok(serde_json::to_writer(file, &saving)?))
}

/// Reads the copy of the node of this name.
pub(super) fn restore(state_dir: &Path, node: &str) -> io::Result<Cluster> {
    let saved: Saved = serde_json::from_str(&COPY.read(state_dir)?)?;
    if saved.format != FORMAT || *saved.node != *node {
        let problem =
            format!("it has format {} of node {:?}; format {FORMAT} of {node:?} is read", saved.format, saved.node);
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    let listed = |kind| saved.listed.contains(&kind);
    Ok(Cluster {
        pods: Table::restored(saved.pods, listed(Kind::Pod)),
        namespaces: Table::restored(saved.namespaces, listed(Kind::Namespace)),
        nodes: Table::restored(saved.nodes, listed(Kind::Node)),
        services: Table::restored(saved.services, listed(Kind::Service)),
        slices: Table::restored(saved.slices, listed(Kind::EndpointSlice)),
        policies: Table::restored(saved.policies, listed(Kind::AuthorizationPolicy)),
        authentications: Table::restored(saved.authentications, listed(Kind::PeerAuthentication)),
        meshed: saved.meshed,
        ..Cluster::default()
    })
}
