//! Everything the API server has said.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    attachments::{Attached, Attachment},
    objects,
    read::Reader,
    records::{ConfiguredRecord, Key, NamespaceRecord, NodeRecord, PodRecord, ServiceRecord, SliceRecord},
    status::Kind,
    table::{self, Delta, Table},
    watch::Seen,
};

/// An event of one of the watches.
pub(super) enum Change {
    Pod(Seen<objects::Pod>),
    Namespace(Seen<objects::Namespace>),
    Node(Seen<objects::Node>),
    Service(Seen<objects::Service>),
    Slice(Seen<objects::EndpointSlice>),
    Policy(Seen<objects::Configured>),
    Authentication(Seen<objects::Configured>),
}

/// What the owner of the state hears.
#[expect(clippy::large_enum_variant, reason = "nearly all news are changes")]
pub(super) enum News {
    /// Of a watch.
    Change(Change),
    /// The CNI plugin has handed a pod's namespace over.
    Attached(Attachment),
    /// The sandbox of this number is gone.
    Detached(String),
    /// Whether everything is to be un-enrolled, for good.
    Leaving(bool),
}

/// The records of every kind.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    pub(super) pods: Table<Key, PodRecord>,
    /// By name, with an empty namespace.
    pub(super) namespaces: Table<Key, NamespaceRecord>,
    /// This one, if it is known.
    pub(super) nodes: Table<Key, NodeRecord>,
    pub(super) services: Table<Key, ServiceRecord>,
    pub(super) slices: Table<Key, SliceRecord>,
    pub(super) policies: Table<Key, ConfiguredRecord>,
    pub(super) authentications: Table<Key, ConfiguredRecord>,
    /// Services that had an endpoint in the mesh, and have had none that is known to be outside
    /// since.
    pub(super) meshed: BTreeSet<Key>,
    /// Pods that the CNI plugin handed over.
    pub(super) attached: HashMap<Key, Attached>,
    /// Nobody takes part any more: Underpass is being removed.
    pub(super) leaving: bool,
}

/// What has become different.
#[derive(Debug)]
pub(super) struct Changes {
    pub(super) pods: table::Changes<Key, PodRecord>,
    pub(super) namespaces: table::Changes<Key, NamespaceRecord>,
    pub(super) services: table::Changes<Key, ServiceRecord>,
    pub(super) slices: table::Changes<Key, SliceRecord>,
    pub(super) node: bool,
    pub(super) policies: bool,
    pub(super) authentications: bool,
}

impl Changes {
    /// As if there had been nothing before.
    pub(super) fn everything(cluster: &Cluster) -> Self {
        fn all<R: PartialEq>(table: &Table<Key, R>) -> table::Changes<Key, R> {
            table.iter().map(|(key, _)| (key.clone(), None)).collect()
        }
        Self {
            pods: all(&cluster.pods),
            namespaces: all(&cluster.namespaces),
            services: all(&cluster.services),
            slices: all(&cluster.slices),
            node: true,
            policies: true,
            authentications: true,
        }
    }
}

impl Cluster {
    /// Takes in an event; `true` when something is different now.
    pub(super) fn take(&mut self, reader: &mut Reader, change: Change) -> bool {
        let listed = matches!(change, Change::Pod(Seen::ListEnds) | Change::Slice(Seen::ListEnds));
        let pods_listed = matches!(change, Change::Pod(Seen::ListEnds));
        let attached = &self.attached;
        let changed = match change {
            Change::Pod(seen) => {
                let read = |reader: &mut Reader, pod: &objects::Pod| {
                    let mut record = reader.pod(pod)?;
                    if !attached.is_empty() {
                        complete(&mut record, attached.get(&reader.key(&pod.metadata)));
                    }
                    Some(record)
                };
                take(&mut self.pods, reader, seen, |o| &o.metadata, read)
            }
            Change::Namespace(seen) => {
                take(&mut self.namespaces, reader, seen, |o| &o.metadata, |_, o| Some(Reader::namespace(o)))
            }
            Change::Node(seen) => take(&mut self.nodes, reader, seen, |o| &o.metadata, |r, o| Some(r.node(o))),
            Change::Service(seen) => take(&mut self.services, reader, seen, |o| &o.metadata, Reader::service),
            Change::Slice(seen) => take(&mut self.slices, reader, seen, |o| &o.metadata, Reader::slice),
            Change::Policy(seen) => {
                take(&mut self.policies, reader, seen, |o| &o.metadata, |_, o| Some(Reader::configured(o)))
            }
            Change::Authentication(seen) => {
                take(&mut self.authentications, reader, seen, |o| &o.metadata, |_, o| Some(Reader::configured(o)))
            }
        };
        if pods_listed {
            // Those that were handed over while the list came were not known when it began.
            let attached: Vec<_> = self.attached.keys().cloned().collect();
            for key in attached {
                self.complete(&key);
            }
        }
        if listed {
            reader.prune();
        }
        changed
    }

    /// What has changed since this was last called. `None` the first time: everything.
    pub(super) fn changes(&mut self) -> Option<Changes> {
        // All of them, so that each begins to note from now on.
        let (pods, services, slices) = (self.pods.changes(), self.services.changes(), self.slices.changes());
        let (namespaces, nodes) = (self.namespaces.changes(), self.nodes.changes());
        let (policies, authentications) = (self.policies.changes(), self.authentications.changes());
        Some(Changes {
            pods: pods?,
            services: services?,
            slices: slices?,
            namespaces: namespaces?,
            node: !nodes?.is_empty(),
            policies: !policies?.is_empty(),
            authentications: !authentications?.is_empty(),
        })
    }

    /// The pods of a namespace.
    pub(super) fn pods_in<'a>(&'a self, namespace: &'a Arc<str>) -> impl Iterator<Item = &'a Key> {
        let first = Key { namespace: Arc::clone(namespace), name: "".into() };
        self.pods.keys_from(first).take_while(move |key| key.namespace == *namespace)
    }

    /// The services of a namespace.
    pub(super) fn services_in<'a>(&'a self, namespace: &'a Arc<str>) -> impl Iterator<Item = &'a Key> {
        let first = Key { namespace: Arc::clone(namespace), name: "".into() };
        self.services.keys_from(first).take_while(move |key| key.namespace == *namespace)
    }

    /// A pod was handed over: its addresses are known before the API server tells them.
    pub(super) fn attach(&mut self, key: &Key, attached: Attached) {
        self.attached.insert(key.clone(), attached);
        self.complete(key);
    }

    /// Gives a pod the addresses that it was handed over with, while it has none.
    fn complete(&mut self, key: &Key) {
        let attached = self.attached.get(key);
        if let Some(record) = self.pods.get(key).filter(|record| record.addresses.is_empty()) {
            let mut completed = PodRecord::clone(record);
            complete(&mut completed, attached);
            self.pods.take(Delta::Apply(key.clone(), Some(completed)));
        }
    }

    /// Forgets the pod with this sandbox; its key.
    pub(super) fn detach(&mut self, container: &str) -> Option<Key> {
        let key = self.attached.iter().find(|(_, a)| a.container == container).map(|(key, _)| key.clone())?;
        self.attached.remove(&key);
        Some(key)
    }

    /// Has every kind been listed?
    pub(super) fn synced(&self) -> bool {
        self.counts().into_iter().all(|(_, _, synced)| synced)
    }

    /// The kinds that are known to exist.
    pub(super) fn listed(&self) -> impl Iterator<Item = Kind> {
        let all = [
            (Kind::Pod, self.pods.listed()),
            (Kind::Namespace, self.namespaces.listed()),
            (Kind::Node, self.nodes.listed()),
            (Kind::Service, self.services.listed()),
            (Kind::EndpointSlice, self.slices.listed()),
            (Kind::AuthorizationPolicy, self.policies.listed()),
            (Kind::PeerAuthentication, self.authentications.listed()),
        ];
        all.into_iter().filter_map(|(kind, listed)| listed.then_some(kind))
    }

    /// How many there are of each kind, and whether it has been listed.
    pub(super) fn counts(&self) -> [(Kind, usize, bool); 7] {
        [
            (Kind::Pod, self.pods.len(), self.pods.synced()),
            (Kind::Namespace, self.namespaces.len(), self.namespaces.synced()),
            (Kind::Node, self.nodes.len(), self.nodes.synced()),
            (Kind::Service, self.services.len(), self.services.synced()),
            (Kind::EndpointSlice, self.slices.len(), self.slices.synced()),
            (Kind::AuthorizationPolicy, self.policies.len(), self.policies.synced()),
            (Kind::PeerAuthentication, self.authentications.len(), self.authentications.synced()),
        ]
    }
}

/// The addresses of a pod that the API server has not told yet.
fn complete(record: &mut PodRecord, attached: Option<&Attached>) {
    if let Some(attached) = attached.filter(|a| record.addresses.is_empty() && a.is(record)) {
        record.addresses.clone_from(&attached.addresses);
    }
}

fn take<T, R: PartialEq>(
    table: &mut Table<Key, R>,
    reader: &mut Reader,
    seen: Seen<T>,
    meta: impl Fn(&T) -> &kube::api::ObjectMeta,
    read: impl Fn(&mut Reader, &T) -> Option<R>,
) -> bool {
    let delta = match seen {
        Seen::Applied(object) => Delta::Apply(reader.key(meta(&object)), read(reader, &object)),
        Seen::Listed(object) => Delta::Listed(reader.key(meta(&object)), read(reader, &object)),
        Seen::Deleted(object) => Delta::Delete(reader.key(meta(&object))),
        Seen::ListBegins => Delta::ListBegins,
        Seen::ListEnds => Delta::ListEnds,
        Seen::Absent => return table.none(),
    };
    table.take(delta)
}
