//! Records and clusters for tests.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{
    mesh::{MeshSettings, Snapshot, SnapshotBuilder},
    sources::kubernetes::{
        cluster::{Change, Cluster},
        compile::{Compiled, Compiler},
        finder::Finder,
        read::Reader,
        records::{Excluded, PodRecord},
        watch::Seen,
    },
};

/// This node.
pub(in crate::sources::kubernetes) const NODE: &str = "node-a";

/// A pod of another node, in no mesh.
pub(in crate::sources::kubernetes) fn pod(uid: &str, address: &str) -> PodRecord {
    PodRecord {
        uid: uid.into(),
        node: Some("node-b".into()),
        service_account: "default".into(),
        labels: BTreeMap::new(),
        choice: None,
        occupied: false,
        host_network: false,
        terminating: false,
        addresses: vec![address.parse().expect("an address")],
        created: 0,
        exclude: Excluded::default(),
        probe_ports: Vec::new(),
        problems: Vec::new(),
    }
}

/// A cluster whose objects are given as JSON, and the compiler that sees it.
pub(in crate::sources::kubernetes) struct Scene {
    pub(in crate::sources::kubernetes) cluster: Cluster,
    reader: Reader,
    compiler: Compiler,
    pub(in crate::sources::kubernetes) base: Snapshot,
    _pods: tempfile::TempDir,
}

impl Scene {
    pub(in crate::sources::kubernetes) fn new() -> Self {
        let pods = tempfile::tempdir().expect("a directory");
        let settings = MeshSettings { root_namespace: "istio-system".into(), ..MeshSettings::default() };
        Self {
            cluster: Cluster::default(),
            reader: Reader::new(NODE),
            compiler: Compiler::new(Finder::new(pods.path()), "cluster.local"),
            base: SnapshotBuilder::new(NODE, "td.test".parse().expect("a domain"), settings).build(),
            _pods: pods,
        }
    }

    /// Applies an object by its `kind`; an unknown one is a mistake of the test.
    pub(in crate::sources::kubernetes) fn apply(&mut self, object: Value) -> bool {
        self.change(object, Seen::Applied)
    }

    pub(in crate::sources::kubernetes) fn delete(&mut self, object: Value) -> bool {
        self.change(object, Seen::Deleted)
    }

    fn change(&mut self, object: Value, seen: impl Fn(Value) -> Seen<Value>) -> bool {
        fn typed<T: DeserializeOwned>(seen: Seen<Value>) -> Seen<T> {
            let object = |v| serde_json::from_value(v).expect("an object of its kind");
            match seen {
                Seen::Applied(v) => Seen::Applied(object(v)),
                Seen::Deleted(v) => Seen::Deleted(object(v)),
                _ => unreachable!("tests apply and delete"),
            }
        }
        let kind = object["kind"].as_str().expect("a kind").to_owned();
        let seen = seen(object);
        let change = match kind.as_str() {
            "Pod" => Change::Pod(typed(seen)),
            "Namespace" => Change::Namespace(typed(seen)),
            "Node" => Change::Node(typed(seen)),
            "Service" => Change::Service(typed(seen)),
            "EndpointSlice" => Change::Slice(typed(seen)),
            "AuthorizationPolicy" => Change::Policy(typed(seen)),
            "PeerAuthentication" => Change::Authentication(typed(seen)),
            other => panic!("{other} is no kind of this source"),
        };
        self.cluster.take(&mut self.reader, change)
    }

    pub(in crate::sources::kubernetes) fn compile(&mut self) -> Compiled {
        self.compiler.compile(&self.cluster, &self.base)
    }
}
