//! Records and clusters for tests.

use std::{collections::BTreeMap, time::Instant};

use serde_json::Value;

use crate::{
    mesh::{MeshSettings, Snapshot, SnapshotBuilder},
    sources::kubernetes::{
        cluster::Cluster,
        compile::{Compiled, Compiler},
        finder::Finder,
        manifests::change,
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
        unvouched: None,
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
    /// Remembers nothing but enrolments.
    anew: Compiler,
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
            anew: Compiler::new(Finder::new(pods.path()), "cluster.local"),
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

    pub(in crate::sources::kubernetes) fn change(&mut self, object: Value, seen: fn(Value) -> Seen<Value>) -> bool {
        let change = change(object, seen).expect("an object of its kind");
        self.cluster.take(&mut self.reader, change)
    }

    pub(in crate::sources::kubernetes) fn compile(&mut self) -> Compiled {
        self.compiler.compile(&mut self.cluster, &self.base)
    }

    pub(in crate::sources::kubernetes) fn compile_at(&mut self, now: Instant) -> Compiled {
        self.compiler.compile_at(&mut self.cluster, &self.base, now)
    }

    /// After [`Self::compile_at`], whose changes this would miss if it looked at them.
    pub(in crate::sources::kubernetes) fn compile_anew_at(&mut self, now: Instant) -> Compiled {
        self.anew.forget();
        self.anew.compile_at(&mut self.cluster, &self.base, now)
    }
}
