//! From everything that is known to a snapshot. One object that is wrong takes nothing else with it.
//!
//! What was made the last time is kept, and only what a change concerns is made again: a pod, the pods that claim the same
//! address, the services they are endpoints of. A change to a namespace concerns its pods, one to a `PeerAuthentication` this
//! node's, one to the settings everything. The result is what it would be if everything was made anew.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
    sync::Arc,
    time::Instant,
};

use underpass_abi::capacity;

use super::{
    cluster::{Changes, Cluster},
    disputes::{self, Claimants, Disputes, Vips},
    enrolment::Enrolments,
    finder::Finder,
    holdings::Holdings,
    modes::Modes,
    pods::{self, Known, Placed, workload_key},
    policies,
    problems::Problems,
    records::Key,
    services,
    status::Problem,
    wiring::{Candidates, Replaced, Wiring},
};
use crate::{
    mesh::{Departures, MeshSettings, Protocol, Snapshot, SnapshotBuilder},
    pod_identity::NoIdentity,
};

/// Turns clusters into snapshots.
#[derive(Debug)]
pub(super) struct Compiler {
    enrolments: Enrolments,
    finder: Finder,
    disputes: Disputes,
    domain: Arc<str>,
    /// What was made of the cluster the last time.
    made: Option<Made>,
}

/// What came out.
pub(super) struct Compiled {
    pub(super) snapshot: Snapshot,
    pub(super) problems: Vec<Problem>,
    /// When the result will be another one although nothing was said.
    pub(super) due: Option<Instant>,
    /// Every pod of this node was found.
    pub(super) complete: bool,
    /// Addresses that several objects claim.
    pub(super) disputed: usize,
}

#[derive(Debug)]
struct Made {
    /// Those of the base; the snapshot's have the node's addresses, too.
    settings: MeshSettings,
    /// Of the cluster: nobody takes part any more.
    leaving: bool,
    snapshot: Snapshot,
    modes: Modes,
    wiring: Wiring,
    vips: Vips,
    /// Pods that are captured here.
    here: BTreeMap<Key, Here>,
    /// Pods of this node that take no part because it is written down, with their uids.
    left: BTreeMap<Key, Arc<str>>,
    /// Pods that take part and are no workload, because they have no address, say. They must not be dialled in plaintext.
    unreachable: HashSet<Key>,
    /// How many pods of a namespace take part; none of 0.
    members: HashMap<Arc<str>, usize>,
    holdings: Holdings,
    services: Candidates,
    problems: Problems,
}

/// A pod that is captured here.
#[derive(Debug, PartialEq, Eq)]
struct Here {
    uid: Arc<str>,
    terminating: bool,
}

impl Made {
    fn nothing(base: &Snapshot, leaving: bool) -> Self {
        let builder = SnapshotBuilder::new(&base.node, base.trust_domain.clone(), base.settings.clone());
        Self {
            settings: base.settings.clone(),
            leaving,
            snapshot: builder.build(),
            modes: Modes::default(),
            wiring: Wiring::default(),
            vips: Vips::default(),
            here: BTreeMap::new(),
            left: BTreeMap::new(),
            unreachable: HashSet::new(),
            members: HashMap::new(),
            holdings: Holdings::default(),
            services: Candidates::default(),
            problems: Problems::default(),
        }
    }

    fn is_over(&self, base: &Snapshot) -> bool {
        let made = &self.snapshot;
        made.node == base.node && made.trust_domain == base.trust_domain && self.settings == base.settings
    }
}

impl Compiler {
    pub(super) fn new(finder: Finder, domain: &str) -> Self {
        let (enrolments, disputes) = (Enrolments::default(), Disputes::default());
        Self { enrolments, finder, disputes, domain: domain.into(), made: None }
    }

    /// Where this node's pods are.
    pub(super) fn finder(&mut self) -> &mut Finder {
        &mut self.finder
    }

    /// Forgets what was made, so that everything is made anew.
    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        self.made = None;
    }

    /// Builds a snapshot over `base`, which has the node's name, trust domain and settings. A compiler always sees the same cluster,
    /// and nobody else asks it for its changes. Blocks on the file system.
    pub(super) fn compile(&mut self, cluster: &mut Cluster, base: &Snapshot) -> Compiled {
        self.compile_at(cluster, base, Instant::now())
    }

    /// As above, at this moment.
    pub(super) fn compile_at(&mut self, cluster: &mut Cluster, base: &Snapshot, now: Instant) -> Compiled {
        let made = self.made.take().filter(|made| made.is_over(base));
        let (mut made, changes) = if let (Some(made), Some(changes)) = (made, cluster.changes()) {
            (made, changes)
        } else {
            self.enrolments.retain(|key| cluster.pods.get(key).is_some());
            (Made::nothing(base, cluster.leaving), Changes::everything(cluster))
        };
        if changes.authentications {
            let (settings, problems) = (&base.settings, &mut made.problems.modes);
            problems.clear();
            made.modes = Modes::new(cluster, settings.mode, &settings.root_namespace, problems);
        }
        let mut pods = self.dirty_pods(&mut made, cluster, &changes, now);
        let mut dirty = made.wiring.services(cluster, &changes);
        disputes::note_vips(&mut made.vips, cluster, &changes);
        let touched = disputes::touched(cluster, &changes, &pods);
        let (claims, vips) = (&made.wiring.claims, &made.vips);
        let moved = self.disputes.settle(&Claimants { cluster, node: &base.node, claims, vips }, touched);
        pods.extend(moved.pods);
        dirty.extend(moved.services);
        for pod in &pods {
            let old = changes.pods.get(pod).and_then(Option::as_deref);
            dirty.extend(made.wiring.concerned(cluster, pod, old).cloned());
        }
        for namespace in changes.namespaces.keys() {
            dirty.extend(cluster.services_in(&namespace.name).cloned());
        }
        if changes.node {
            // The zone may be another one.
            dirty.extend(cluster.services.iter().map(|(key, _)| key.clone()));
        }
        let (placed, complete) = self.place(&mut made, cluster, base, &pods, now, &mut dirty);
        let mut pass =
            Pass { builder: SnapshotBuilder::amend(made.snapshot.clone()), disputed: false, made: &mut made };
        for namespace in pass.pods(&self.finder, &self.disputes, cluster, base, placed) {
            dirty.extend(cluster.services_in(&namespace).cloned());
        }
        let meshed = pass.services(&self.disputes, cluster, base, &self.domain, dirty);
        if changes.policies {
            pass.policies(cluster, base);
        }
        if changes.node {
            pass.node(cluster, base);
        }
        pass.departures(cluster);
        let snapshot = pass.builder.build();
        self.disputes.published(&snapshot);
        if !changes.namespaces.is_empty() {
            made.problems.namespaces(cluster);
        }
        for (service, meshed) in meshed {
            if meshed {
                cluster.meshed.insert(service);
            } else {
                cluster.meshed.remove(&service);
            }
        }
        made.snapshot = snapshot.clone();
        made.problems.disputes = self.disputes.problems(&made.wiring.claims, &made.vips);
        let problems = made.problems.all();
        self.made = Some(made);
        let disputed = self.disputes.len();
        Compiled { snapshot, problems, due: self.enrolments.due(), complete, disputed }
    }

    /// The pods that have to be looked at.
    fn dirty_pods(&mut self, made: &mut Made, cluster: &Cluster, changes: &Changes, now: Instant) -> HashSet<Key> {
        let mut dirty = made.wiring.pods(cluster, changes);
        for namespace in changes.namespaces.keys() {
            dirty.extend(cluster.pods_in(&namespace.name).cloned());
        }
        if changes.authentications {
            dirty.extend(made.here.keys().cloned());
        }
        if mem::replace(&mut made.leaving, cluster.leaving) != cluster.leaving {
            dirty.extend(cluster.pods.iter().map(|(key, _)| key.clone()));
        }
        dirty.extend(self.enrolments.ended(now).cloned());
        for key in changes.pods.keys().filter(|key| cluster.pods.get(key).is_none()) {
            self.enrolments.forget(key);
        }
        dirty
    }

    /// Decides about pods, and finds those of this node. A pod that is gone has nothing decided about it. Were all found?
    fn place<'a>(
        &mut self,
        made: &mut Made,
        cluster: &'a Cluster,
        base: &Snapshot,
        dirty: &HashSet<Key>,
        now: Instant,
        services: &mut BTreeSet<Key>,
    ) -> (Vec<(Key, Option<Placed<'a>>)>, bool) {
        let mut placed = Vec::with_capacity(dirty.len());
        let mut others = false;
        for key in dirty {
            let pod = cluster.pods.entry(key);
            let pod = pod.map(|(key, record)| pods::place(cluster, &base.node, &mut self.enrolments, key, record, now));
            match pod.filter(|pod| pod.left && !pod.record.uid.is_empty()) {
                Some(pod) => drop(made.left.insert(key.clone(), Arc::clone(&pod.record.uid))),
                None => drop(made.left.remove(key)),
            }
            let here = pod
                .filter(|pod| pod.captured_here)
                .map(|pod| Here { uid: Arc::clone(&pod.record.uid), terminating: pod.record.terminating });
            if made.here.get(key) != here.as_ref() {
                others = true;
                match here {
                    Some(here) => drop(made.here.insert(key.clone(), here)),
                    None => drop(made.here.remove(key)),
                }
            }
            placed.push((key.clone(), pod));
        }
        let all_found = |made: &Made, finder: &Finder| {
            made.here.iter().all(|(key, here)| here.terminating || finder.place(key, &here.uid).is_some())
        };
        if others || !all_found(made, &self.finder) {
            let all: Vec<_> = made.here.iter().map(|(key, here)| (key, Arc::clone(&here.uid))).collect();
            self.finder.find(&all);
        }
        // A pod may be somewhere else than it was, or be found at last, although nothing was said about it.
        for (key, here) in &made.here {
            let local = made.snapshot.workload(&workload_key(key)).and_then(|workload| workload.local.as_ref());
            let moved = match (local, self.finder.place(key, &here.uid)) {
                (None, None) => false,
                // As text: comparing paths by their components takes ten times as long.
                (Some(was), Some(is)) => {
                    let [old, new] = [was.cgroup.as_ref(), is.cgroup.as_ref()].map(|path| path.map(|p| p.as_os_str()));
                    was.netns != is.netns || old != new
                }
                _ => true,
            };
            if moved && !dirty.contains(key) {
                let pod = cluster.pods.entry(key);
                let pod = pod.map(|(key, pod)| pods::place(cluster, &base.node, &mut self.enrolments, key, pod, now));
                placed.push((key.clone(), pod));
                services.extend(made.wiring.concerned(cluster, key, None).cloned());
            }
        }
        let complete = all_found(made, &self.finder);
        (placed, complete)
    }
}

/// One snapshot on its way.
struct Pass<'a> {
    made: &'a mut Made,
    builder: SnapshotBuilder,
    /// Several services, or a service and a pod, claim an address, or did: who has it is decided anew.
    disputed: bool,
}

impl Pass<'_> {
    /// Makes the workloads of these pods. Returns the namespaces that have their first pod in the
    /// mesh, or had their last.
    fn pods(
        &mut self,
        finder: &Finder,
        disputes: &Disputes,
        cluster: &Cluster,
        base: &Snapshot,
        placed: Vec<(Key, Option<Placed<'_>>)>,
    ) -> HashSet<Arc<str>> {
        let made = &mut *self.made;
        let context = pods::Context { cluster, base, disputes, modes: &made.modes, finder };
        let mut replaced: Vec<(Key, Option<Known>)> = Vec::new();
        let mut flipped = HashSet::new();
        for (key, placed) in placed {
            let without_identity = placed.as_ref().and_then(|pod| pod.without_identity);
            let mut problems: Vec<String> = without_identity.map(without_identity_here).into_iter().collect();
            let pod = placed.filter(Placed::takes_part);
            let known = pod.and_then(|pod| {
                pods::workload(&context, &pod, &mut problems).unwrap_or_else(|e| {
                    problems.push(e.to_string());
                    None
                })
            });
            made.problems.pod(&key, problems);
            let workload_key = workload_key(&key);
            let before = made.snapshot.workload(&workload_key);
            let was_member = before.is_some() || made.unreachable.contains(&key);
            if was_member != pod.is_some() && count(&mut made.members, &key.namespace, pod.is_some()) {
                flipped.insert(Arc::clone(&key.namespace));
            }
            if pod.is_some() && known.is_none() {
                made.unreachable.insert(key.clone());
            } else {
                made.unreachable.remove(&key);
            }
            let workload = known.as_ref().map(|(workload, _)| &**workload);
            let held = placed.map_or_else(pods::Held::default, |placed| pods::held(cluster, &placed, workload));
            made.holdings.set(&mut self.builder, &key, held);
            let same = match (before, &known) {
                (None, None) => true,
                (Some(before), Some((workload, policy))) => {
                    before == workload && *made.snapshot.workload_policy(&workload_key) == **policy
                }
                _ => false,
            };
            if !same {
                let addresses = before.into_iter().chain(known.as_ref().map(|(w, _)| w)).flat_map(|w| &w.addresses);
                self.disputed |= addresses.into_iter().any(|address| made.services.claim(*address));
                replaced.push((key, known));
            }
        }
        if self.disputed {
            self.builder.clear_services();
        }
        // An address may go from one pod to another, so first they all lose theirs.
        for (key, _) in &replaced {
            self.builder.remove_workload(&workload_key(key));
        }
        for (key, known) in replaced {
            let Some((workload, policy)) = known else { continue };
            match self.builder.shared_workload(&workload) {
                Ok(()) => self.builder.workload_policy(&workload.key, policy),
                Err(e) => {
                    made.problems.also_of_pod(&key, e.to_string());
                    if workload.protocol != Protocol::Plain {
                        let addresses = cluster.pods.get(&key).map_or(&[][..], |record| pods::claims(record)).to_vec();
                        made.holdings.set(&mut self.builder, &key, pods::Held { addresses, awaited: false });
                    }
                    made.unreachable.insert(key);
                }
            }
        }
        flipped
    }

    /// Makes these services. Returns those of which it is known now whether they are in the mesh,
    /// and whether.
    fn services(
        &mut self,
        disputes: &Disputes,
        cluster: &Cluster,
        base: &Snapshot,
        domain: &str,
        dirty: BTreeSet<Key>,
    ) -> Vec<(Key, bool)> {
        let made = &mut *self.made;
        let node = cluster.nodes.iter().next().map(|(_, node)| node);
        let context = services::Context {
            cluster,
            base,
            zone: node.and_then(|n| n.zone.as_deref()),
            slices: &made.wiring.slices,
            mesh: self.builder.so_far(),
            unreachable: &made.unreachable,
            disputes,
            members: &made.members,
            domain,
        };
        let (mut replaced, mut meshed, mut watched) = (Vec::new(), Vec::new(), Vec::new());
        for key in dirty {
            let gone = || services::Made { service: None, meshed: Some(false), watched: Vec::new() };
            let service = cluster.services.get(&key).map_or_else(gone, |record| context.service(&key, record));
            let was = cluster.meshed.contains(&key);
            meshed.extend(service.meshed.filter(|is| *is != was).map(|is| (key.clone(), is)));
            watched.push((key.clone(), service.watched));
            replaced.extend(made.services.set(key, service.service));
        }
        for (key, addresses) in watched {
            made.wiring.watch(&key, addresses);
        }
        let disputed =
            self.disputed || replaced.iter().any(|replaced| made.services.disputed(replaced, self.builder.so_far()));
        if disputed {
            self.builder.clear_services();
            made.problems.clear_services();
            for (key, service) in made.services.iter() {
                let added = self.builder.shared_service(service);
                made.problems.service(key, added.err().map(|e| e.to_string()));
            }
            return meshed;
        }
        for service in replaced.iter().filter_map(|replaced| replaced.before.as_ref()) {
            self.builder.remove_service(service);
        }
        for Replaced { key, after, .. } in &replaced {
            let added = after.as_ref().map_or(Ok(()), |service| self.builder.shared_service(service));
            made.problems.service(key, added.err().map(|e| e.to_string()));
        }
        meshed
    }

    /// Who left on purpose. Only what the API server says itself counts: a copy may be older than
    /// the pod.
    fn departures(&mut self, cluster: &Cluster) {
        let heard = cluster.pods.synced() && cluster.namespaces.synced();
        let uids = if heard { self.made.left.values().cloned().collect() } else { BTreeSet::new() };
        self.builder.departures(Departures {
            in_sync: cluster.synced(),
            everybody: cluster.leaving,
            uids,
            workloads: BTreeSet::new(),
        });
    }

    fn policies(&mut self, cluster: &Cluster, base: &Snapshot) {
        let problems = &mut self.made.problems.policies;
        problems.clear();
        self.builder.clear_policies();
        for (key, record) in cluster.policies.iter() {
            policies::add(&mut self.builder, key, record, &base.settings.root_namespace, problems);
        }
    }

    /// Where probe ports are open to the node's addresses and the configuration names none, they
    /// are those of the node's object.
    fn node(&mut self, cluster: &Cluster, base: &Snapshot) {
        let probes = &base.settings.probes;
        let mut addresses = probes.node_addresses.clone();
        if addresses.is_empty() && probes.from_node_addresses {
            let node = cluster.nodes.iter().next().map(|(_, node)| &node.addresses);
            addresses.extend(node.into_iter().flatten().take(capacity::NODE_ADDRESSES));
        }
        self.builder.settings().probes.node_addresses = addresses;
    }
}

/// What is said of a pod of this node that is asked to take part and has no identity.
fn without_identity_here(why: NoIdentity) -> String {
    format!(
        "it stays outside of the mesh: {why}, or take it out with the label underpass.io/mode: disabled. Until then its \
         traffic is plaintext, which STRICT pods refuse"
    )
}

/// Counts a pod of a namespace in or out; `true` when it is the first, or was the last.
fn count(members: &mut HashMap<Arc<str>, usize>, namespace: &Arc<str>, is_in: bool) -> bool {
    if is_in {
        let count = members.entry(Arc::clone(namespace)).or_default();
        *count += 1;
        return *count == 1;
    }
    let Some(count) = members.get_mut(namespace) else { return false };
    *count -= 1;
    let last = *count == 0;
    if last {
        members.remove(namespace);
    }
    last
}
