//! Values that are refused, each with a message that names the field.

use anyhow::{Result, ensure};

use crate::helm::Helm;

/// What is set, with `--set` or an option of its own, and what the message says.
const WRONG: &[(&str, &str)] = &[
    // Misspelt, at every depth.
    ("mtls=true", "Additional property mtls is not allowed"),
    ("mesh.strict=true", "mesh: Additional property strict is not allowed"),
    ("mesh.exclude.ports={1}", "mesh.exclude: Additional property ports is not allowed"),
    ("agent.hardend=true", "agent: Additional property hardend is not allowed"),
    ("agent.resources.request.cpu=1", "agent.resources: Additional property request is not allowed"),
    ("ca.root.secret=a", "ca.root: Additional property secret is not allowed"),
    ("cni.binDirectory=/opt", "cni: Additional property binDirectory is not allowed"),
    ("issuer.external.root.configmap=a", "issuer.external.root: Additional property configmap is not allowed"),
    ("monitoring.serviceMonitor.enable=true", "monitoring.serviceMonitor: Additional property enable is not allowed"),
    ("image.tags=1", "image: Additional property tags is not allowed"),
    ("agent.tolerations[0].operators=Exists", "agent.tolerations.0: Additional property operators is not allowed"),
    ("accessLog.namespaces[0].namespace=a", "accessLog.namespaces.0: Additional property namespace is not allowed"),
    // None of the choices.
    ("profile=production", "profile must be one of"),
    ("platform=eks", "platform must be one of"),
    ("mesh.mode=STRICT", "mesh.mode must be one of"),
    ("mesh.plaintextRefusal=reject", "mesh.plaintextRefusal must be one of"),
    ("issuer.kind=istiod", "issuer.kind must be one of"),
    ("ca.root.source=cert-manager", "ca.root.source must be one of"),
    ("image.pullPolicy=always", "image.pullPolicy must be one of"),
    ("logFormat=yaml", "logFormat must be one of"),
    ("agent.update.surge=yes-please", "agent.update.surge must be one of"),
    // Not of the form.
    ("trustDomain=Example.org", "trustDomain: Does not match pattern"),
    ("clusterDomain=cluster..local", "clusterDomain: Does not match pattern"),
    ("image.repository=Registry/Underpass", "image.repository: Does not match pattern"),
    ("image.digest=sha256:abc", "image.digest: Does not match pattern"),
    ("image.tag=a b", "image.tag: Does not match pattern"),
    ("certificates.lifetime=1 day", "certificates.lifetime: Does not match pattern"),
    ("mesh.cidrs={10.0.0.0}", "mesh.cidrs.0: Does not match pattern"),
    ("mesh.cidrs={10.0.0.0/33}", "mesh.cidrs.0: Does not match pattern"),
    ("mesh.exclude.outboundCIDRs={fd00::/129}", "mesh.exclude.outboundCIDRs.0: Does not match pattern"),
    ("probes.cgroups={system.slice}", "probes.cgroups.0: Does not match pattern"),
    ("probes.nodeAddresses={node-a}", "probes.nodeAddresses.0: Does not match pattern"),
    ("issuer.external.address=http://istiod:15012", "issuer.external.address: Does not match pattern"),
    ("issuer.external.address=https://istiod", "issuer.external.address: Does not match pattern"),
    ("agent.extraArgs={relay-threads=2}", "agent.extraArgs.0: Does not match pattern"),
    ("agent.cgroup=kubepods", "agent.cgroup: Does not match pattern"),
    ("agent.resources.requests.memory=lots", "agent.resources.requests.memory: Does not match pattern"),
    ("cni.binDir=opt/cni/bin", "cni.binDir: Does not match pattern"),
    ("cni.confDir=/etc/cni net.d", "cni.confDir: Does not match pattern"),
    ("cni.confName=../10-calico.conflist", "cni.confName: Does not match pattern"),
    ("cni.exemptNamespaces={Kube_System}", "cni.exemptNamespaces.0: Does not match pattern"),
    // Out of range.
    ("mesh.exclude.inboundPorts={0}", "mesh.exclude.inboundPorts.0: Must be greater than or equal to 1"),
    ("mesh.exclude.outboundPorts={65536}", "mesh.exclude.outboundPorts.0: Must be less than or equal to 65535"),
    ("--set-json=accessLog.sample=1.5", "accessLog.sample: Must be less than or equal to 1"),
    ("agent.drainSeconds=-1", "agent.drainSeconds: Must be greater than or equal to 0"),
    ("agent.ports.metrics=80", "agent.ports.metrics: Must be greater than or equal to 1024"),
    ("agent.update.nodes=0", "agent.update.nodes: Must be greater than or equal to 1"),
    ("agent.update.nodes=101%", "agent.update.nodes: Does not match pattern"),
    ("ca.replicas=0", "ca.replicas: Must be greater than or equal to 1"),
    ("ca.ratePerNode=0", "ca.ratePerNode: Must be greater than or equal to 1"),
    ("uninstall.timeoutSeconds=5", "uninstall.timeoutSeconds: Must be greater than or equal to 10"),
    ("--set-json=networkPolicy.apiServerPorts=[]", "networkPolicy.apiServerPorts: Array must have at least 1 items"),
    // Of another type.
    ("agent.hardened=maybe", "agent.hardened: Invalid type. Expected: boolean, given: string"),
    ("ca.replicas=two", "ca.replicas: Invalid type. Expected: integer, given: string"),
    ("mesh.cidrs=10.0.0.0/8", "mesh.cidrs: Invalid type. Expected: array, given: string"),
    // One by one right, together wrong.
    ("issuer.kind=external", "issuer.external.address is empty"),
    ("issuer.kind=external,issuer.external.address=https://a:1", "issuer.external.root needs exactly one of"),
    (
        "issuer.kind=external,issuer.external.address=https://a:1,issuer.external.root.configMap=a,issuer.external.root.secret=b",
        "issuer.external.root needs exactly one of",
    ),
    (
        "issuer.kind=external,issuer.external.address=https://a:1,issuer.external.root.secret=b",
        "issuer.external.root.key is empty",
    ),
    ("issuer.revocationLists.configMap=a", "issuer.revocationLists.key is empty"),
    ("ca.root.source=issuer", "ca.root.secretName is empty with ca.root.source: issuer"),
    ("ca.root.source=existing", "ca.root.secretName is empty with ca.root.source: existing"),
    ("ca.root.secretName=mine", "ca.root.secretName is \"mine\", but"),
    ("agent.nodeTaint=underpass.io/not-ready", "agent.nodeTaint was taken out"),
    ("agent.ports.metrics=15021", "agent.ports.metrics and agent.ports.health are both 15021"),
];

#[test]
fn wrong_values_are_refused_by_name() -> Result<()> {
    let helm = Helm::find()?;
    for (set, said) in WRONG {
        let set = if set.starts_with("--") { (*set).to_owned() } else { format!("--set={set}") };
        let message = helm.refusal(&[&set])?;
        ensure!(message.contains(said), "{set}: {said:?} is not in: {message}");
    }
    Ok(())
}

#[test]
fn older_clusters_are_refused() -> Result<()> {
    let message = Helm::find()?.refusal(&["--kube-version=1.19.16"])?;
    ensure!(message.contains("requires kubeVersion: >=1.20.0-0"), "{message}");
    Ok(())
}
