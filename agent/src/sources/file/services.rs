//! `services` of the document.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use rustls_pki_types::DnsName;
use serde_saphyr::Spanned;

use super::{ConfigError, fields::Check, schema, yaml::quoted};
use crate::mesh::{
    BuildError, Endpoint, Service, ServicePort, SnapshotBuilder, TrustDomain, Workload, WorkloadKey, check_name,
};

/// Adds services one by one and remembers what later entries are checked against.
pub(super) struct Services<'a> {
    check: Check<'a>,
    trust_domain: &'a TrustDomain,
    workloads: HashMap<WorkloadKey, Arc<Workload>>,
    names: HashSet<(String, String)>,
    hostnames: HashMap<String, String>,
}

impl<'a> Services<'a> {
    pub(super) fn new(
        check: Check<'a>,
        trust_domain: &'a TrustDomain,
        workloads: HashMap<WorkloadKey, Arc<Workload>>,
    ) -> Self {
        Self { check, trust_domain, workloads, names: HashSet::new(), hostnames: HashMap::new() }
    }

    pub(super) fn add(
        &mut self,
        builder: &mut SnapshotBuilder,
        index: usize,
        entry: &Spanned<schema::Service>,
    ) -> Result<(), ConfigError> {
        let (check, s) = (self.check, &entry.value);
        let at = |field: &str| format!("services[{index}].{field}");
        check.name("name", &at("name"), &s.name)?;
        check.name("namespace", &at("namespace"), &s.namespace)?;
        let full = format!("{}/{}", s.namespace.value, s.name.value);
        if !self.names.insert((s.namespace.value.clone(), s.name.value.clone())) {
            let problem = format!("service {full} is defined twice; give one of them another name or namespace");
            return Err(check.wrong(&s.name, &at("name"), problem));
        }
        let hostname = self.hostname(s, &at("hostname"), &full)?;

        let mut vips = Vec::with_capacity(s.vips.len());
        for (i, text) in s.vips.iter().enumerate() {
            let field = at(&format!("vips[{i}]"));
            let vip = check.address(&field, text)?;
            if vips.contains(&vip) {
                return Err(check.wrong(text, &field, format!("address {vip} is listed twice; remove one")));
            }
            vips.push(vip);
        }
        if s.ports.value.is_empty() {
            let problem = format!("service {full} has no port; add at least one, like {{port: 80, targetPort: 8080}}");
            return Err(check.wrong(&s.ports, &at("ports"), problem));
        }
        let ports = service_ports(check, &at("ports"), &s.ports.value)?;

        let mut endpoints: Vec<Endpoint> = Vec::with_capacity(s.endpoints.len());
        let mut seen = HashSet::new();
        for (i, e) in s.endpoints.iter().enumerate() {
            let field = at(&format!("endpoints[{i}]"));
            let workload = self.endpoint(&format!("{field}.workload"), &e.workload)?;
            if !seen.insert(workload.key.clone()) {
                let problem = format!("workload {} is listed twice; remove one", workload.key);
                return Err(check.wrong(&e.workload, &format!("{field}.workload"), problem));
            }
            endpoints
                .push(Endpoint { ports: overrides(check, &format!("{field}.ports"), &e.ports, &ports)?, workload });
        }
        let service = Service {
            namespace: s.namespace.value.as_str().into(),
            name: s.name.value.as_str().into(),
            hostname: hostname.into(),
            vips: vips.clone(),
            ports,
            endpoints,
            awaited: None,
        };
        builder.service(service).map_err(|e| {
            let place = match &e {
                BuildError::DuplicateAddress { address, .. } | BuildError::UnusableAddress { address, .. } => {
                    vips.iter().position(|a| a == address)
                }
                _ => None,
            };
            match place {
                Some(i) => check.wrong(&s.vips[i], &at(&format!("vips[{i}]")), e),
                None => check.wrong(&s.name, &at("name"), e),
            }
        })
    }

    fn hostname(&mut self, s: &schema::Service, field: &str, full: &str) -> Result<String, ConfigError> {
        let default = || format!("{}.{}.svc.{}", s.name.value, s.namespace.value, self.trust_domain);
        let hostname = s.hostname.as_ref().map_or_else(default, |h| h.value.clone());
        let at = s.hostname.as_ref().unwrap_or(&s.name);
        // Names compare byte by byte everywhere else, so only the lower-case spelling is accepted.
        if s.hostname.is_some()
            && (check_name("hostname", &hostname).is_err() || DnsName::try_from(hostname.as_str()).is_err())
        {
            let problem = format!(
                "{} is no host name; write lower-case DNS labels, like web.default.svc.cluster.local",
                quoted(&hostname)
            );
            return Err(self.check.wrong(at, field, problem));
        }
        if let Some(other) = self.hostnames.insert(hostname.clone(), full.to_owned()) {
            let problem =
                format!("host name {} belongs to service {other} already; give one of them another", quoted(&hostname));
            return Err(self.check.wrong(at, field, problem));
        }
        Ok(hostname)
    }

    fn endpoint(&self, field: &str, reference: &Spanned<String>) -> Result<Arc<Workload>, ConfigError> {
        let value = quoted(&reference.value);
        let Some((namespace, name)) = reference.value.split_once('/') else {
            return Err(self.check.wrong(reference, field, format!("{value} is no workload; write NAMESPACE/NAME")));
        };
        let key = WorkloadKey { namespace: namespace.into(), name: name.into() };
        self.workloads.get(&key).cloned().ok_or_else(|| {
            let problem =
                format!("{value} is not among the workloads of this document; add it there or correct the name");
            self.check.wrong(reference, field, problem)
        })
    }
}

fn service_ports(
    check: Check<'_>,
    field: &str,
    ports: &[schema::ServicePort],
) -> Result<Vec<ServicePort>, ConfigError> {
    let mut seen = HashSet::new();
    let mut out = Vec::with_capacity(ports.len());
    for (i, p) in ports.iter().enumerate() {
        let field = format!("{field}[{i}]");
        let port = check.port(&format!("{field}.port"), &p.port)?;
        if !seen.insert(port) {
            let problem = format!("port {port} is listed twice; remove one");
            return Err(check.wrong(&p.port, &format!("{field}.port"), problem));
        }
        let target_port = match &p.target_port {
            Some(t) => check.port(&format!("{field}.targetPort"), t)?,
            None => port,
        };
        out.push(ServicePort { port, target_port });
    }
    Ok(out)
}

/// An endpoint's own ports: each overrides one port of the service, so both numbers are needed.
fn overrides(
    check: Check<'_>,
    field: &str,
    ports: &[schema::ServicePort],
    service: &[ServicePort],
) -> Result<Vec<ServicePort>, ConfigError> {
    for (i, p) in ports.iter().enumerate() {
        let field = format!("{field}[{i}]");
        if p.target_port.is_none() {
            let problem = format!(
                "port {} has no targetPort; an endpoint lists only ports it maps elsewhere: add it",
                p.port.value
            );
            return Err(check.wrong(&p.port, &field, problem));
        }
        if !service.iter().any(|s| s.port == p.port.value) {
            let problem =
                format!("port {} is not among the service's ports; add it there or remove it here", p.port.value);
            return Err(check.wrong(&p.port, &format!("{field}.port"), problem));
        }
    }
    service_ports(check, field, ports)
}
