//! Values that the chart is rendered with.

/// What `helm install` does without a word.
pub const DEFAULT: &str = "";

pub const DEMO: &str = "
profile: demo
";

pub const HARDENED: &str = "
agent: { hardened: true }
";

/// Another authority: nothing of `underpass ca` is left.
pub const EXTERNAL: &str = "
issuer:
  kind: external
  external:
    address: https://istiod.istio-system.svc:15012
    root: { configMap: istio-ca-root-cert, key: root-cert.pem }
";

/// A root that cert-manager makes.
pub const CERT_MANAGER: &str = "
ca:
  root: { source: issuer, secretName: underpass-issuer }
";

/// Every value with something else than its default, but without objects of other projects' CRDs.
pub const EVERYTHING: &str = r#"
platform: k3s
image:
  repository: registry.example.com:5000/mesh/underpass
  tag: 1.2.3
  digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
  pullPolicy: Always
  pullSecrets: [registry, mirror]
trustDomain: example.org
clusterDomain: k8s.example.org
logLevel: info,underpass::tunnel=debug
logFormat: json
commonLabels: { team: mesh }
podLabels: { tier: infrastructure }
podAnnotations: { example.org/cost: low }
certificates: { lifetime: 12h }
issuer:
  revocationLists: { configMap: our-revocations, key: lists.pem }
mesh:
  mode: strict
  rootNamespace: mesh-config
  plaintextRefusal: drop
  captureAll: true
  cidrs: [10.0.0.0/8, "fd00:10::/64"]
  exclude:
    outboundPorts: [25, 5432]
    outboundCIDRs: [10.9.0.0/16]
    inboundPorts: [9100]
probes:
  cgroups: [/kubelet]
  nodeAddresses: [10.0.0.11, "fd00::11"]
  fromNodeAddresses: true
accessLog:
  enabled: false
  sample: 0.25
  namespaces:
    - { name: data, enabled: true, sample: 1 }
agent:
  hardened: true
  drainSeconds: 300
  cgroup: /sys/fs/cgroup/$(UNDERPASS_NODE)/pods
  update: { surge: false, nodes: 10% }
  ports: { metrics: 25020, health: 25021 }
  priorityClassName: mesh-critical
  resources:
    requests: { cpu: 250m, memory: 256Mi }
    limits: { memory: 2Gi }
  nodeSelector: { mesh: "yes" }
  tolerations:
    - { key: dedicated, operator: Equal, value: edge, effect: NoSchedule }
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
          - matchExpressions: [{ key: virtual, operator: DoesNotExist }]
  podLabels: { part: agent }
  podAnnotations: { example.org/part: agent }
  serviceAccountAnnotations: { example.org/role: reader }
  seLinuxOptions: { type: spc_t, level: "s0" }
  extraArgs: [--relay-threads=2, --max-series=100]
  extraEnv:
    - { name: RUST_BACKTRACE, value: "1" }
    - name: POD_IP
      valueFrom: { fieldRef: { fieldPath: status.podIP } }
cni:
  confName: 10-flannel.conflist
  exemptNamespaces: [kube-system, storage]
ca:
  replicas: 3
  root: { source: existing, secretName: our-root, lifetime: 365days, replacedBefore: 30days }
  ratePerNode: 5
  ratePerAddress: 7
  priorityClassName: mesh-important
  resources:
    limits: { cpu: 1, memory: 512Mi }
  nodeSelector: { control: "yes" }
  tolerations:
    - { operator: Exists, effect: NoSchedule }
  affinity:
    podAntiAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: kubernetes.io/hostname
          labelSelector: { matchLabels: { app.kubernetes.io/component: ca } }
  podLabels: { part: ca }
  podAnnotations: { example.org/part: ca }
  serviceAccountAnnotations: { example.org/role: signer }
  extraArgs: [--max-requests=64]
  extraEnv:
    - { name: RUST_BACKTRACE, value: full }
networkPolicy:
  apiServerPorts: [6443]
resourceQuota: { enabled: true, pods: 50 }
uninstall: { timeoutSeconds: 600 }
"#;

/// Nothing that can be left out.
pub const LEAST: &str = "
cni: { enabled: false }
networkPolicy: { enabled: false }
uninstall: { enabled: false }
ca: { replicas: 1 }
agent: { tolerations: [] }
";

pub const PLATFORMS: [&str; 5] = ["gke", "k3s", "kind", "microk8s", "openshift"];

/// All that consist of Kubernetes' own kinds, with their names.
pub fn all() -> Vec<(String, String)> {
    let named = [
        ("default", DEFAULT),
        ("demo", DEMO),
        ("hardened", HARDENED),
        ("external", EXTERNAL),
        ("cert-manager", CERT_MANAGER),
        ("everything", EVERYTHING),
        ("least", LEAST),
    ];
    let named = named.map(|(name, values)| (name.to_owned(), values.to_owned()));
    let platforms = PLATFORMS.map(|platform| (platform.to_owned(), format!("platform: {platform}\n")));
    named.into_iter().chain(platforms).collect()
}
