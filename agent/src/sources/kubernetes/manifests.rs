//! The mesh that objects make, without an API server: what tests and the fuzzer look at.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    Problem,
    cluster::{Change, Cluster},
    compile::Compiler,
    finder::Finder,
    read::Reader,
    watch::Seen,
};
use crate::mesh::Snapshot;

/// A directory in which there is no cgroup.
const NOWHERE: &str = "/dev/null";

/// Why an object was not read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// No kind that this source follows.
    #[error("kind {0:?} is not followed")]
    Kind(String),
    /// It does not have the shape of its kind.
    #[error("{kind}: {reason}")]
    Shape {
        /// Its kind.
        kind: String,
        /// What is wrong.
        reason: serde_json::Error,
    },
}

/// The snapshot of a node, and what is wrong with single objects. `base` has the node's name, trust domain and settings. No pod is
/// found on the node.
pub fn compile(
    base: &Snapshot,
    cluster_domain: &str,
    objects: impl IntoIterator<Item = Value>,
) -> Result<(Snapshot, Vec<Problem>), ManifestError> {
    let (mut cluster, mut reader) = (Cluster::default(), Reader::new(&base.node));
    for object in objects {
        cluster.take(&mut reader, change(object, Seen::Applied)?);
    }
    let compiled = Compiler::new(Finder::new(Path::new(NOWHERE)), cluster_domain).compile(&mut cluster, base);
    Ok((compiled.snapshot, compiled.problems))
}

/// The event that a watch of the object's kind would tell.
pub(super) fn change(object: Value, seen: fn(Value) -> Seen<Value>) -> Result<Change, ManifestError> {
    fn typed<T: DeserializeOwned>(seen: Seen<Value>) -> Result<Seen<T>, serde_json::Error> {
        Ok(match seen {
            Seen::Applied(v) => Seen::Applied(serde_json::from_value(v)?),
            Seen::Deleted(v) => Seen::Deleted(serde_json::from_value(v)?),
            Seen::Listed(v) => Seen::Listed(serde_json::from_value(v)?),
            Seen::ListBegins => Seen::ListBegins,
            Seen::ListEnds => Seen::ListEnds,
            Seen::Absent => Seen::Absent,
        })
    }
    let kind = object.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    let seen = seen(object);
    let change = match kind.as_str() {
        "Pod" => typed(seen).map(Change::Pod),
        "Namespace" => typed(seen).map(Change::Namespace),
        "Node" => typed(seen).map(Change::Node),
        "Service" => typed(seen).map(Change::Service),
        "EndpointSlice" => typed(seen).map(Change::Slice),
        "AuthorizationPolicy" => typed(seen).map(Change::Policy),
        "PeerAuthentication" => typed(seen).map(Change::Authentication),
        _ => return Err(ManifestError::Kind(kind)),
    };
    change.map_err(|reason| ManifestError::Shape { kind, reason })
}
