//! From everything that is known to a snapshot. One object that is wrong takes nothing else with it.

use std::{collections::HashMap, sync::Arc, time::Instant};

use underpass_abi::capacity;

use super::{
    cluster::Cluster,
    enrolment::{Enrolments, Phase},
    finder::Finder,
    modes::Modes,
    pods::{self, Made, Placed},
    policies,
    records::Key,
    services,
    status::Problem,
};
use crate::mesh::{Snapshot, SnapshotBuilder, Workload};

/// Turns clusters into snapshots, and remembers what makes the next time cheap.
#[derive(Debug)]
pub(super) struct Compiler {
    enrolments: Enrolments,
    made: Made,
    finder: Finder,
    pass: u64,
    domain: Arc<str>,
}

/// What came out.
pub(super) struct Compiled {
    pub(super) snapshot: Snapshot,
    pub(super) problems: Vec<Problem>,
    /// When the result will be another one although nothing was said.
    pub(super) due: Option<Instant>,
    /// Every pod of this node was found.
    pub(super) complete: bool,
}

impl Compiler {
    pub(super) fn new(finder: Finder, domain: &str) -> Self {
        Self { enrolments: Enrolments::default(), made: Made::default(), finder, pass: 0, domain: domain.into() }
    }

    /// Where this node's pods are.
    pub(super) fn finder(&mut self) -> &mut Finder {
        &mut self.finder
    }

    /// Builds a snapshot over `base`, which has the node's name, trust domain and settings. Blocks on the file system.
    pub(super) fn compile(&mut self, cluster: &Cluster, base: &Snapshot) -> Compiled {
        self.pass += 1;
        let mut problems = Vec::new();
        let (placed, due) = pods::place(cluster, &base.node, &mut self.enrolments, self.pass);
        let here: Vec<&Placed<'_>> = placed.iter().filter(|p| p.captured_here).collect();
        let all: Vec<_> = here.iter().map(|p| (p.key, Arc::clone(&p.record.uid))).collect();
        self.finder.find(&all);
        let found = |p: &Placed<'_>| p.record.terminating || self.finder.place(p.key, &p.record.uid).is_some();
        let complete = here.iter().all(|p| found(p));

        let settings = &base.settings;
        let modes = Modes::new(cluster, settings.mode, &settings.root_namespace, &mut problems);
        let owners = pods::owners(&placed);
        let mut builder = SnapshotBuilder::new(&base.node, base.trust_domain.clone(), settings.clone());
        let taking_part = placed.iter().filter(|p| p.phase != Phase::Out).count();
        builder.reserve(taking_part, cluster.services.len());
        self.made.retain(cluster);
        let context = pods::Context { cluster, base, owners: &owners, modes: &modes, finder: &self.finder };
        // Of pods that take part; `None` is one that cannot be reached, which must not be dialled in plaintext.
        let mut workloads: HashMap<&Key, Option<Arc<Workload>>> = HashMap::with_capacity(placed.len());
        for pod in &placed {
            if !pod.captured_here && pod.phase != Phase::In {
                continue;
            }
            workloads.insert(pod.key, None);
            let made = if pod.captured_here {
                pods::local(&context, pod, &mut problems)
            } else {
                self.made.remote(&context, pod)
            };
            let problem = |problem: String| Problem { object: format!("Pod {}", pod.key), problem };
            match made {
                Ok(Some((workload, policy))) => match builder.shared_workload(&workload) {
                    Ok(()) => {
                        builder.workload_policy(&workload.key, policy);
                        workloads.insert(pod.key, Some(workload));
                    }
                    Err(e) => problems.push(problem(e.to_string())),
                },
                Ok(None) => {}
                Err(e) => problems.push(problem(e.to_string())),
            }
        }

        let slices = services::slices(cluster);
        let node = cluster.nodes.iter().next().map(|(_, node)| node);
        let zone = node.and_then(|n| n.zone.as_deref());
        let context =
            services::Context { cluster, base, zone, slices: &slices, workloads: &workloads, domain: &self.domain };
        for (key, record) in cluster.services.iter() {
            if let Some(service) = context.service(key, record)
                && let Err(e) = builder.service(service)
            {
                problems.push(Problem { object: format!("Service {key}"), problem: e.to_string() });
            }
        }
        for (key, record) in cluster.policies.iter() {
            policies::add(&mut builder, key, record, &settings.root_namespace, &mut problems);
        }
        for (key, namespace) in cluster.namespaces.iter() {
            let object = || format!("Namespace {}", key.name);
            problems.extend(namespace.problems.iter().cloned().map(|problem| Problem { object: object(), problem }));
        }
        let mut snapshot = builder.build();
        let probes = &mut snapshot.settings.probes;
        if probes.node_addresses.is_empty() {
            probes.node_addresses = node.map(|n| n.addresses.clone()).unwrap_or_default();
            probes.node_addresses.truncate(capacity::NODE_ADDRESSES);
        }
        Compiled { snapshot, problems, due, complete }
    }
}
