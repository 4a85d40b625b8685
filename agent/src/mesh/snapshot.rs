//! The immutable index over workloads and services.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock},
};

use super::{
    Departures, EffectiveMode, Held, MeshSettings, ModeSource, Policy, PolicyKey, Protocol, Service, SpiffeId,
    TrustDomain, Workload, WorkloadKey, WorkloadPolicy, sharded::Sharded,
};

/// Labels that name an application, in order of preference: Istio's, the one Kubernetes recommends, the customary one.
const NAME_LABELS: [&str; 3] = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
/// The same for its version.
const REVISION_LABELS: [&str; 3] = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
/// Both lists: what is needed of the labels of a workload that no policy of this node can select.
pub const APPLICATION_LABELS: [&str; 6] =
    [NAME_LABELS[0], NAME_LABELS[1], NAME_LABELS[2], REVISION_LABELS[0], REVISION_LABELS[1], REVISION_LABELS[2]];
/// Revision of a workload whose labels name none, as Istio has it.
pub const LATEST_REVISION: &str = "latest";

/// Everything known about the mesh at one moment. A copy with a few changes shares the rest with its original.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Counts up with each accepted configuration, from 1; 0 is the empty start.
    pub generation: u64,
    /// This node's name.
    pub node: Arc<str>,
    /// The node's own trust domain.
    pub trust_domain: TrustDomain,
    /// Mesh-wide settings.
    pub settings: MeshSettings,
    pub(super) workloads: Sharded<WorkloadKey, Arc<Workload>>,
    pub(super) by_address: Sharded<IpAddr, Arc<Workload>>,
    /// Addresses of pods that are no workloads. What is in the other two indices as well is what
    /// they say.
    pub(super) held: Sharded<IpAddr, Arc<Held>>,
    /// Those of `workloads` that this node has to enrol.
    pub(super) local: Arc<BTreeMap<WorkloadKey, Arc<Workload>>>,
    /// Ordered by namespace and name.
    pub(super) services: Arc<Vec<Arc<Service>>>,
    pub(super) by_vip: Sharded<IpAddr, Arc<Service>>,
    pub(super) by_hostname: Sharded<Arc<str>, Arc<Service>>,
    pub(super) policies: Arc<BTreeMap<PolicyKey, Arc<Policy>>>,
    pub(super) workload_policies: Sharded<WorkloadKey, Arc<WorkloadPolicy>>,
    pub(super) departures: Arc<Departures>,
}

/// What a destination address means.
#[derive(Debug, Clone)]
pub enum Resolution {
    /// A workload's own address.
    Workload(Arc<Workload>),
    /// A service's VIP.
    Service(Arc<Service>),
    /// Nobody may dial it.
    Held(Arc<Held>),
    /// Not an address of the mesh.
    Unknown,
}

impl Resolution {
    /// Is it nothing of the mesh?
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown)
    }
}

impl Snapshot {
    /// A mesh nobody is in; what an agent starts from.
    pub fn empty(node: &str, trust_domain: TrustDomain) -> Self {
        Self {
            generation: 0,
            node: node.into(),
            trust_domain,
            settings: MeshSettings::default(),
            workloads: Sharded::default(),
            by_address: Sharded::default(),
            held: Sharded::default(),
            local: Arc::default(),
            services: Arc::default(),
            by_vip: Sharded::default(),
            by_hostname: Sharded::default(),
            policies: Arc::default(),
            workload_policies: Sharded::default(),
            departures: Arc::default(),
        }
    }

    /// Is it the same mesh, whatever the generation? What both share is not looked at.
    pub fn says_the_same(&self, other: &Self) -> bool {
        self.node == other.node
            && self.trust_domain == other.trust_domain
            && self.settings == other.settings
            && self.workloads == other.workloads
            && self.held == other.held
            && self.services == other.services
            && self.policies == other.policies
            && self.workload_policies == other.workload_policies
            && self.departures == other.departures
    }

    /// What `address` is. IPv4-mapped IPv6 addresses are looked up as IPv4.
    pub fn resolve(&self, address: IpAddr) -> Resolution {
        let address = address.to_canonical();
        if let Some(s) = self.by_vip.get(&address) {
            Resolution::Service(Arc::clone(s))
        } else if let Some(w) = self.by_address.get(&address) {
            Resolution::Workload(Arc::clone(w))
        } else if let Some(held) = self.held.get(&address) {
            Resolution::Held(Arc::clone(held))
        } else {
            Resolution::Unknown
        }
    }

    /// The workload with this key.
    pub fn workload(&self, key: &WorkloadKey) -> Option<&Arc<Workload>> {
        self.workloads.get(key)
    }

    /// The workload that has this address.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// Who makes this address one that nobody may dial.
    pub fn held_at(&self, address: IpAddr) -> Option<&Arc<Held>> {
        self.held.get(&address.to_canonical())
    }

    /// May the agent dial `to` in plaintext for this workload? Never what is reached through a
    /// tunnel, nor an address that is held, nor a service's: behind that may be both. Excluded
    /// ports and networks are dialled in plaintext without the agent, too.
    pub fn allows_plaintext(&self, from: &WorkloadKey, to: SocketAddr) -> bool {
        match self.resolve(to.ip()) {
            Resolution::Unknown => true,
            Resolution::Workload(workload) if workload.protocol == Protocol::Plain => true,
            Resolution::Workload(_) | Resolution::Service(_) | Resolution::Held(_) => self.excludes(from, to),
        }
    }

    fn excludes(&self, from: &WorkloadKey, to: SocketAddr) -> bool {
        let own = self.workload(from).and_then(|workload| workload.local.as_ref()).map(|local| &local.exclude);
        let ip = to.ip().to_canonical();
        own.into_iter().chain([&self.settings.exclude]).any(|exclude| {
            exclude.outbound_ports.contains(&to.port()) || exclude.outbound_cidrs.iter().any(|net| net.contains(&ip))
        })
    }

    /// All workloads, in no particular order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The workloads this node has to enrol, ordered by key.
    pub fn local_workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.local.values()
    }

    /// Does this node have to enrol exactly what it had to with `before`, and do policies have to know the same of it? Takes no time for
    /// snapshots that share it, and others are called different even if they are not.
    pub fn shares_local_workloads(&self, before: &Self) -> bool {
        Arc::ptr_eq(&self.local, &before.local)
    }

    /// Are the policies those of `before`? As above.
    pub fn shares_policies(&self, before: &Self) -> bool {
        Arc::ptr_eq(&self.policies, &before.policies)
    }

    /// Who was taken out of the mesh on purpose. A workload that is neither here nor in the
    /// snapshot has only vanished.
    pub fn departures(&self) -> &Departures {
        &self.departures
    }

    /// All services, ordered by namespace and name.
    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// The service with this host name; one of them, should there be several.
    pub fn service_named(&self, hostname: &str) -> Option<&Arc<Service>> {
        self.by_hostname.get(hostname)
    }

    /// Identities this node must hold certificates for.
    pub fn local_identities(&self) -> BTreeSet<SpiffeId> {
        self.local_workloads().map(|w| w.identity.clone()).collect()
    }

    /// Does `destination` reach this workload: one of its own addresses, or a service that selects it?
    /// Answers with the port the application listens on.
    pub fn accepts(&self, workload: &Workload, destination: SocketAddr) -> Option<u16> {
        let ip = destination.ip().to_canonical();
        if workload.addresses.contains(&ip) {
            return Some(destination.port());
        }
        let service = self.by_vip.get(&ip)?;
        let endpoint = service.endpoints.iter().find(|e| e.workload.key == workload.key)?;
        service.target_port(endpoint, destination.port())
    }

    /// All policies, ordered by key.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// The policy with this key.
    pub fn policy(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// What policies have to know of a workload.
    pub fn workload_policy(&self, key: &WorkloadKey) -> &WorkloadPolicy {
        static NOTHING: LazyLock<WorkloadPolicy> = LazyLock::new(WorkloadPolicy::default);
        self.workload_policies.get(key).map_or(&*NOTHING, Arc::as_ref)
    }

    /// The application that a workload's labels name: Istio's canonical service.
    pub fn canonical_name(&self, key: &WorkloadKey) -> Option<&Arc<str>> {
        let labels = &self.workload_policy(key).labels.0;
        NAME_LABELS.into_iter().find_map(|name| labels.get(name))
    }

    /// Its version by the labels: Istio's canonical revision.
    pub fn canonical_revision(&self, key: &WorkloadKey) -> Option<&Arc<str>> {
        let labels = &self.workload_policy(key).labels.0;
        REVISION_LABELS.into_iter().find_map(|name| labels.get(name))
    }

    /// The mode in force on a port of a workload, and who set it.
    pub fn effective_mode(&self, workload: &Workload, port: u16) -> EffectiveMode {
        let of_port = workload.port_modes.iter().any(|m| m.port == port);
        let set_by = if of_port { ModeSource::Port } else { self.workload_policy(&workload.key).mode_set_by };
        EffectiveMode { mode: workload.mode_of(port), set_by }
    }

    /// Every address that must be captured: workloads in the mesh or not, VIPs, and addresses that
    /// nobody may dial.
    pub fn captured_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let known = |address: &&IpAddr| self.by_address.contains(address) || self.by_vip.contains(address);
        let held = self.held.keys().filter(move |address| !known(address));
        self.by_address.keys().chain(self.by_vip.keys()).chain(held).copied()
    }

    /// Must this address be captured? It is canonical: no IPv4-mapped IPv6.
    pub fn captures(&self, address: IpAddr) -> bool {
        self.by_address.contains(&address) || self.by_vip.contains(&address) || self.held.contains(&address)
    }

    /// Addresses among which are all that must be captured in one of two snapshots and not in the other. Takes little time when the
    /// snapshots share most of what they have.
    pub fn captured_apart<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = IpAddr> + 'a {
        let workloads = self.by_address.keys_apart(&before.by_address);
        let held = self.held.keys_apart(&before.held);
        workloads.chain(self.by_vip.keys_apart(&before.by_vip)).chain(held).copied()
    }
}
