//! What is wrong with objects, by object, so that what has not changed need not be found again.

use std::collections::BTreeMap;

use super::{cluster::Cluster, records::Key, status::Problem};

/// Everything that is wrong.
#[derive(Debug, Default)]
pub(super) struct Problems {
    pub(super) modes: Vec<Problem>,
    pub(super) policies: Vec<Problem>,
    /// Objects that claim the address of another.
    pub(super) disputes: Vec<Problem>,
    pods: BTreeMap<Key, Vec<String>>,
    services: BTreeMap<Key, String>,
    namespaces: Vec<Problem>,
}

impl Problems {
    /// What is wrong with a pod now.
    pub(super) fn pod(&mut self, key: &Key, problems: Vec<String>) {
        if problems.is_empty() {
            self.pods.remove(key);
        } else {
            self.pods.insert(key.clone(), problems);
        }
    }

    /// Something more is wrong with a pod.
    pub(super) fn also_of_pod(&mut self, key: &Key, problem: String) {
        self.pods.entry(key.clone()).or_default().push(problem);
    }

    /// What is wrong with a service now.
    pub(super) fn service(&mut self, key: &Key, problem: Option<String>) {
        match problem {
            Some(problem) => drop(self.services.insert(key.clone(), problem)),
            None => drop(self.services.remove(key)),
        }
    }

    /// Nothing is known of any service.
    pub(super) fn clear_services(&mut self) {
        self.services.clear();
    }

    /// Looks at all namespaces.
    pub(super) fn namespaces(&mut self, cluster: &Cluster) {
        let problems = cluster.namespaces.iter().flat_map(|(key, namespace)| {
            let object = format!("Namespace {}", key.name);
            namespace.problems.iter().map(move |problem| Problem { object: object.clone(), problem: problem.clone() })
        });
        self.namespaces = problems.collect();
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<Problem> {
        let pods = self.pods.iter().flat_map(|(key, problems)| {
            problems.iter().map(move |problem| Problem { object: format!("Pod {key}"), problem: problem.clone() })
        });
        let services = self.services.iter();
        let services =
            services.map(|(key, problem)| Problem { object: format!("Service {key}"), problem: problem.clone() });
        let single = [&self.modes, &self.policies, &self.namespaces, &self.disputes].into_iter().flatten().cloned();
        pods.chain(services).chain(single).collect()
    }
}
