//! Puts a [`Snapshot`] together and refuses what does not fit together.

use std::{collections::btree_map::Entry, fmt::Display, net::IpAddr, sync::Arc};

use super::{
    Departures, Held, MeshSettings, Policy, PolicyKey, Service, Snapshot, TrustDomain, Workload, WorkloadKey,
    WorkloadPolicy,
};

/// Why a set of workloads and services is not a mesh. Nothing of it is applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// Two workloads with one key.
    #[error("workload {0} is defined twice; give one of them another name or namespace")]
    DuplicateWorkload(WorkloadKey),
    /// Two claims on one address.
    #[error("address {address} belongs to {first} and to {second}; an address identifies one workload or service")]
    DuplicateAddress {
        /// The address.
        address: IpAddr,
        /// Who has it.
        first: String,
        /// Who claims it too.
        second: String,
    },
    /// An address no peer could dial.
    #[error(
        "address {address} of {owner} is loopback, unspecified, link-local or multicast; use an address that other nodes can reach"
    )]
    UnusableAddress {
        /// The address.
        address: IpAddr,
        /// Whose.
        owner: String,
    },
    /// A local workload without an address cannot be enrolled.
    #[error("local workload {0} has no address; list at least one under `addresses`")]
    NoAddress(WorkloadKey),
    /// Two policies with one key.
    #[error("policy {0} is defined twice; give one of them another name or namespace")]
    DuplicatePolicy(PolicyKey),
}

/// Collects workloads and services, then [`build`](Self::build)s.
#[derive(Debug)]
pub struct SnapshotBuilder {
    snapshot: Snapshot,
}

impl SnapshotBuilder {
    /// Starts a snapshot for this node.
    pub fn new(node: &str, trust_domain: TrustDomain, settings: MeshSettings) -> Self {
        let mut snapshot = Snapshot::empty(node, trust_domain);
        snapshot.settings = settings;
        Self { snapshot }
    }

    /// Goes on from a finished snapshot. What is not changed stays shared with it.
    pub fn amend(snapshot: Snapshot) -> Self {
        Self { snapshot }
    }

    /// What is there by now.
    pub fn so_far(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The settings.
    pub fn settings(&mut self) -> &mut MeshSettings {
        &mut self.snapshot.settings
    }

    /// Adds a workload and returns the shared copy that services refer to.
    pub fn workload(&mut self, mut workload: Workload) -> Result<Arc<Workload>, BuildError> {
        for a in &mut workload.addresses {
            *a = a.to_canonical();
        }
        let workload = Arc::new(workload);
        self.shared_workload(&workload)?;
        Ok(workload)
    }

    /// Adds a workload whose addresses are canonical: no IPv4-mapped IPv6.
    pub fn shared_workload(&mut self, workload: &Arc<Workload>) -> Result<(), BuildError> {
        if workload.local.is_some() && workload.addresses.is_empty() {
            return Err(BuildError::NoAddress(workload.key.clone()));
        }
        let owner = || format!("workload {}", workload.key);
        self.claim_all(&workload.addresses, owner)?;
        let snapshot = &mut self.snapshot;
        if snapshot.workloads.contains(&workload.key) {
            return Err(BuildError::DuplicateWorkload(workload.key.clone()));
        }
        snapshot.workloads.insert(workload.key.clone(), Arc::clone(workload));
        if workload.local.is_some() {
            Arc::make_mut(&mut snapshot.local).insert(workload.key.clone(), Arc::clone(workload));
        }
        for &a in &workload.addresses {
            snapshot.by_address.insert(a, Arc::clone(workload));
        }
        Ok(())
    }

    /// Takes a workload away, with what policies know of it. Services that refer to it keep what they have.
    pub fn remove_workload(&mut self, key: &WorkloadKey) {
        let snapshot = &mut self.snapshot;
        snapshot.workload_policies.remove(key);
        let Some(gone) = snapshot.workloads.remove(key) else { return };
        for address in &gone.addresses {
            snapshot.by_address.remove(address);
        }
        if snapshot.local.contains_key(key) {
            Arc::make_mut(&mut snapshot.local).remove(key);
        }
    }

    /// Adds a service.
    pub fn service(&mut self, mut service: Service) -> Result<(), BuildError> {
        for a in &mut service.vips {
            *a = a.to_canonical();
        }
        self.shared_service(&Arc::new(service))
    }

    /// Adds a service whose addresses are canonical: no IPv4-mapped IPv6.
    pub fn shared_service(&mut self, service: &Arc<Service>) -> Result<(), BuildError> {
        self.claim_all(&service.vips, || format!("service {}/{}", service.namespace, service.name))?;
        let snapshot = &mut self.snapshot;
        for &a in &service.vips {
            snapshot.by_vip.insert(a, Arc::clone(service));
        }
        snapshot.by_hostname.insert(Arc::clone(&service.hostname), Arc::clone(service));
        let services = Arc::make_mut(&mut snapshot.services);
        let at = services.partition_point(|s| (&s.namespace, &s.name) <= (&service.namespace, &service.name));
        services.insert(at, Arc::clone(service));
        Ok(())
    }

    /// Takes this very service away, if it is there.
    pub fn remove_service(&mut self, service: &Arc<Service>) {
        let snapshot = &mut self.snapshot;
        let order = |s: &Arc<Service>| (&s.namespace, &s.name).cmp(&(&service.namespace, &service.name));
        let first = snapshot.services.partition_point(|s| order(s).is_lt());
        let mut of_that_name = snapshot.services[first..].iter().take_while(|s| order(s).is_eq());
        let Some(at) = of_that_name.position(|s| Arc::ptr_eq(s, service)) else { return };
        Arc::make_mut(&mut snapshot.services).remove(first + at);
        for vip in &service.vips {
            snapshot.by_vip.remove(vip);
        }
        if snapshot.by_hostname.get(&service.hostname).is_some_and(|s| Arc::ptr_eq(s, service)) {
            snapshot.by_hostname.remove(&service.hostname);
        }
    }

    /// Makes an address one that nobody may dial, unless a workload or service has it. `false` for
    /// one that nobody could dial anyway.
    pub fn hold(&mut self, address: IpAddr, held: Held) -> bool {
        let address = address.to_canonical();
        if unusable(address) {
            return false;
        }
        self.snapshot.held.insert(address, Arc::new(held));
        true
    }

    /// Gives a held address free.
    pub fn release(&mut self, address: IpAddr) {
        self.snapshot.held.remove(&address.to_canonical());
    }

    /// Takes all services away.
    pub fn clear_services(&mut self) {
        let snapshot = &mut self.snapshot;
        (snapshot.services, snapshot.by_vip, snapshot.by_hostname) = Default::default();
    }

    /// Adds a policy.
    pub fn policy(&mut self, policy: Policy) -> Result<(), BuildError> {
        match Arc::make_mut(&mut self.snapshot.policies).entry(policy.key.clone()) {
            Entry::Occupied(e) => Err(BuildError::DuplicatePolicy(e.key().clone())),
            Entry::Vacant(e) => {
                e.insert(Arc::new(policy));
                Ok(())
            }
        }
    }

    /// Takes all policies away.
    pub fn clear_policies(&mut self) {
        self.snapshot.policies = Arc::default();
    }

    /// Says what policies have to know of a workload; one that nothing is said of has no labels.
    pub fn workload_policy(&mut self, workload: &WorkloadKey, policy: impl Into<Arc<WorkloadPolicy>>) {
        let snapshot = &mut self.snapshot;
        snapshot.workload_policies.insert(workload.clone(), policy.into());
        if snapshot.local.contains_key(workload) {
            // What a snapshot before this one shares is the same for policies, too.
            Arc::make_mut(&mut snapshot.local);
        }
    }

    /// Says who was taken out of the mesh on purpose.
    pub fn departures(&mut self, departures: Departures) {
        if *self.snapshot.departures != departures {
            self.snapshot.departures = Arc::new(departures);
        }
    }

    /// The finished snapshot, still without a generation.
    pub fn build(self) -> Snapshot {
        self.snapshot
    }

    fn claim_all<O: Display>(&self, addresses: &[IpAddr], owner: impl Fn() -> O) -> Result<(), BuildError> {
        for (i, &address) in addresses.iter().enumerate() {
            self.claim(address, &owner)?;
            if addresses[..i].contains(&address) {
                let (first, second) = (owner().to_string(), owner().to_string());
                return Err(BuildError::DuplicateAddress { address, first, second });
            }
        }
        Ok(())
    }

    fn claim<O: Display>(&self, address: IpAddr, owner: impl Fn() -> O) -> Result<(), BuildError> {
        if unusable(address) {
            return Err(BuildError::UnusableAddress { address, owner: owner().to_string() });
        }
        let workload = self.snapshot.by_address.get(&address).map(|w| format!("workload {}", w.key));
        let service = || self.snapshot.by_vip.get(&address).map(|s| format!("service {}/{}", s.namespace, s.name));
        match workload.or_else(service) {
            Some(first) => Err(BuildError::DuplicateAddress { address, first, second: owner().to_string() }),
            None => Ok(()),
        }
    }
}

/// No peer could dial it.
fn unusable(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(a) => a.is_link_local() || a.is_broadcast(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    };
    address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local
}
