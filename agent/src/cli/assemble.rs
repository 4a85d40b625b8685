//! Puts the agent together out of its parts, and takes it apart again.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Context as _;
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
    signal::{SigSet, Signal},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
};
use tracing::{info, warn};

use super::{
    RunArgs,
    ports::Ports,
    run::{KtlsMode, Resumption, Switch},
};
use crate::{
    admin::{
        api::{self, CertificateStatus, KtlsStatus, Status},
        http::{NodeView, View},
        inventory::CertificateDetails,
        server::{self, AdminState, StatusProvider},
    },
    capture::{Capture, CaptureOptions, cleanup},
    identity::{CertificateStore, FilesIssuer, Issuer, IstioIssuer, LocalIssuer},
    mesh::{CertificateFiles, MeshStore, Snapshot, SpiffeId},
    proxy::{Applied, Enforcement, Limits, PodState, PodStatus, Proxy, Reconciler},
    relay::{ConnectionTable, Relay, RelayOptions, ThreadHealth},
    sources::{
        file::{FileSource, IssuerConfig, NodeConfig, ReloadStats, ReloadStatus},
        kubernetes::{KubernetesSource, Statuses},
    },
    telemetry::{AccessLog, Telemetry, logging::LogFormat},
    tunnel::{
        Suite, TlsConfigs, TlsOptions,
        ktls::{Availability, Support},
    },
};

/// Runs the agent until SIGTERM or SIGINT.
pub(super) fn run(args: RunArgs, format: LogFormat) -> anyhow::Result<()> {
    harden();
    let (access, _writer) = AccessLog::stdout(format).context("opening standard output for the access log")?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("underpass")
        .build()
        .context("starting the runtime")?
        .block_on(agent(args, access))
}

/// Keys must not reach a core file, and two descriptors per connection need a high limit. Neither failing is a reason not to run.
/// A supervisor may have left signals blocked, which threads started later would inherit: without SIGTERM there is no clean end.
pub(super) fn harden() {
    if let Err(e) = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]).thread_unblock() {
        warn!(error = %e, "SIGTERM and SIGINT may stay blocked");
    }
    if let Err(e) = prctl::set_dumpable(false) {
        warn!(error = %e, "core dumps stay possible (prctl PR_SET_DUMPABLE)");
    }
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(limit) => info!(limit, "descriptors"),
        Err(e) => warn!(error = %e, "the descriptor limit stays as it is (RLIMIT_NOFILE)"),
    }
}

async fn agent(args: RunArgs, access: AccessLog) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;

    let cgroup = super::cgroup::attach_point(args.cgroup.as_deref())?;
    let (source, config) = FileSource::open(&args.config, &args.state_dir, args.node.as_deref())?;
    let mut ports = Ports::open(&args).await?;
    let mut tasks = tokio::task::JoinSet::new();
    let health = ports.answer_probes(&mut tasks);
    let reload = source.stats();
    let cluster = match &config.kubernetes {
        Some(kubernetes) => {
            Some(KubernetesSource::new(kubernetes, &config.snapshot.node, &cgroup, &args.state_dir).await?)
        }
        None => None,
    };
    let cluster_status = cluster.as_ref().map(KubernetesSource::statuses);
    let (issuer, prepare) = issuer(&config)?;
    let trust_domain = config.snapshot.trust_domain.clone();
    let mesh = Arc::new(MeshStore::new(Snapshot::empty(&config.snapshot.node, trust_domain.clone())));

    let certificates = CertificateStore::new(issuer);
    let table = ConnectionTable::new();
    let telemetry = Telemetry::new(args.max_series as usize, access);
    let counters = Arc::clone(&telemetry.counters);
    let ktls = kernel_tls(args.ktls).await;
    let relay_options = RelayOptions { threads: args.relay_threads.unwrap_or(0).into(), ..RelayOptions::default() };
    let relay =
        Relay::start(&relay_options, Arc::clone(&table), Arc::clone(&counters)).context("starting the relay")?;
    let capture =
        Capture::start(CaptureOptions { cgroup, pin_root: args.pin_root.clone(), tc: args.tc, bpf_log: args.bpf_log })
            .await
            .context("starting capture")?;
    let proxy = Arc::new(Proxy {
        capture: Arc::clone(&capture),
        mesh: Arc::clone(&mesh),
        tls: TlsConfigs::with_options(
            Arc::clone(&certificates),
            trust_domain,
            &TlsOptions {
                records_per_key: args.records_per_key,
                resumption: args.resumption == Resumption::On,
                ..TlsOptions::with_ktls(ktls.clone())
            },
        ),
        certificates: Arc::clone(&certificates),
        relay: Arc::clone(&relay),
        table: Arc::clone(&table),
        policies: Enforcement::new(mesh.load()),
        counters: Arc::clone(&counters),
        telemetry: Arc::clone(&telemetry),
        access_log: args.access_log == Switch::On,
        limits: Limits {
            handshake: args.handshake_timeout,
            connect: args.connect_timeout,
            pending_per_pod: args.max_pending_per_pod as usize,
            connections_per_pod: args.max_connections_per_pod as usize,
        },
    });
    let reconciler = Reconciler::new(proxy, prepare);

    tasks.spawn(Arc::clone(&certificates).run());
    tasks.spawn(super::memory::give_back(Arc::clone(&table)));
    // What the file changes: the mesh itself, or only the settings that hold for what the cluster says.
    let watched = match cluster {
        None => {
            mesh.replace(config.snapshot);
            reconciler.reconcile().await;
            capture.collect_garbage().await;
            tasks.spawn(Arc::clone(&reconciler).run());
            Arc::clone(&mesh)
        }
        Some(cluster) => {
            let base = Arc::new(MeshStore::new(config.snapshot));
            tasks.spawn(cluster.run(Arc::clone(&base), Arc::clone(&mesh)));
            tasks.spawn(follow_cluster(Arc::clone(&mesh), Arc::clone(&reconciler), Arc::clone(&capture)));
            base
        }
    };
    tasks.spawn(async move {
        if let Err(e) = source.watch(watched).await {
            warn!(error = %e, "the configuration is not watched any more; changes need a restart");
        }
    });
    let provider = Arc::new(NodeStatus {
        reconciler: Arc::clone(&reconciler),
        certificates: Arc::clone(&certificates),
        capture: Arc::clone(&capture),
        relay: Arc::clone(&relay),
        reload,
        cluster: cluster_status,
        ktls,
    });
    let view = View {
        mesh: Arc::clone(&mesh),
        table: Arc::clone(&table),
        certificates: Arc::clone(&certificates),
        telemetry,
        node: Arc::clone(&provider) as Arc<dyn NodeView>,
    };
    let quit = Arc::new(Notify::new());
    ports.answer(&mut tasks, &view, &quit);
    let socket = super::admin_socket(&args.run_dir);
    let admin = server::serve(&socket, AdminState { table, counters, mesh, provider })
        .with_context(|| format!("opening the admin socket {}", socket.display()))?;
    tasks.spawn(admin);
    tasks.spawn(health.watch(view));
    info!(version = env!("CARGO_PKG_VERSION"), "running");

    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM"),
        _ = interrupt.recv() => info!("SIGINT"),
        () = quit.notified() => {}
    }
    // Nothing may be enrolled again from here on.
    tasks.shutdown().await;
    if args.cleanup_on_exit {
        capture.leave_nothing();
        reconciler.unenrol_all().await;
    }
    tokio::task::spawn_blocking(move || relay.shutdown()).await.context("stopping the relay")?;
    if args.cleanup_on_exit {
        drop((reconciler, capture));
        let report = cleanup::cleanup(&args.pin_root, &[], true).await.context("removing pins")?;
        info!(?report, "pods have plain traffic again");
    } else {
        info!("pods stay captured: their connections are refused until an agent runs again (see `underpass cleanup`)");
    }
    Ok(())
}

/// Waits until the cluster is known: until then the pods that an earlier agent captured stay as they are.
async fn follow_cluster(mesh: Arc<MeshStore>, reconciler: Arc<Reconciler>, capture: Arc<Capture>) {
    let mut generations = mesh.subscribe();
    if generations.wait_for(|generation| *generation > 0).await.is_err() {
        return;
    }
    reconciler.reconcile().await;
    capture.collect_garbage().await;
    reconciler.run().await;
}

/// What the kernel can do with the tunnels' records; says so.
async fn kernel_tls(mode: KtlsMode) -> Support {
    let support = match mode {
        KtlsMode::Auto => Support::prepare().await,
        KtlsMode::Off => Support::disabled(),
    };
    let names = |suites: &[Suite]| suites.iter().map(|suite| suite.as_str()).collect::<Vec<_>>().join(", ");
    match &support.availability {
        Availability::Ready => {
            for (suite, why) in &support.refused {
                warn!(cipher = suite.as_str(), %why, "the kernel does not have this cipher; connections that use it are protected in the agent");
            }
            info!(ciphers = %names(&support.suites), rekey = support.rekey, "the kernel protects the tunnels' records");
        }
        Availability::Missing(why) => {
            warn!(%why, "no kernel TLS: records are protected in the agent, which costs more CPU");
        }
        Availability::Disabled => info!("kernel TLS is off: records are protected in the agent"),
    }
    support
}

type Prepare = Box<dyn Fn(&Snapshot) + Send + Sync>;

/// The issuer, and what it has to see of every snapshot.
fn issuer(config: &NodeConfig) -> anyhow::Result<(Arc<dyn Issuer>, Prepare)> {
    match &config.issuer {
        IssuerConfig::Local { ca_dir, lifetime } => {
            let issuer = LocalIssuer::open(ca_dir, &config.snapshot.trust_domain, *lifetime)?;
            Ok((Arc::new(issuer), Box::new(|_| {})))
        }
        IssuerConfig::Istio(ca) => Ok((Arc::new(IstioIssuer::new(ca.clone())?), Box::new(|_| {}))),
        IssuerConfig::Files => {
            let issuer = Arc::new(FilesIssuer::new(certificate_files(&config.snapshot))?);
            let configured = Arc::clone(&issuer);
            Ok((issuer, Box::new(move |snapshot| configured.set(certificate_files(snapshot)))))
        }
    }
}

fn certificate_files(snapshot: &Snapshot) -> BTreeMap<SpiffeId, CertificateFiles> {
    let files = |w: &Arc<crate::mesh::Workload>| Some((w.identity.clone(), w.local.as_ref()?.files.clone()?));
    snapshot.local_workloads().filter_map(files).collect()
}

/// What the admin socket tells of the node.
struct NodeStatus {
    reconciler: Arc<Reconciler>,
    certificates: Arc<CertificateStore>,
    capture: Arc<Capture>,
    relay: Arc<Relay>,
    reload: Arc<ReloadStats>,
    cluster: Option<Statuses>,
    ktls: Support,
}

impl NodeView for NodeStatus {
    fn bpf_counters(&self) -> BTreeMap<String, u64> {
        self.capture.counters()
    }

    fn bpf_maps(&self) -> Vec<(&'static str, usize, usize)> {
        self.capture.map_sizes()
    }

    fn pods(&self) -> Vec<PodStatus> {
        self.reconciler.pods()
    }

    fn applied(&self) -> Applied {
        self.reconciler.applied()
    }

    fn reload(&self) -> ReloadStatus {
        self.reload.status()
    }

    fn relay(&self) -> Vec<ThreadHealth> {
        self.relay.health()
    }
}

impl StatusProvider for NodeStatus {
    fn status(&self) -> Status {
        let pods = self.reconciler.pods().into_iter().map(|pod| {
            let svid = self.certificates.current(&pod.identity);
            let (state, pod_id, reason) = match pod.state {
                PodState::Enrolled { pod_id } => (api::PodState::Enrolled, Some(pod_id), None),
                PodState::Refused { reason } => (api::PodState::Refused, None, Some(reason)),
            };
            api::PodStatus {
                workload: pod.key.to_string(),
                identity: pod.identity.to_string(),
                netns: pod.netns.display().to_string(),
                pod_id,
                state,
                reason,
                certificate: svid.map(|s| CertificateStatus::new(&s.serial, s.not_before, s.not_after)),
            }
        });
        let status = Status::new(KtlsStatus::of(&self.ktls), pods.collect(), self.reload.status());
        let probe_cgroups = self.capture.probe_cgroups().into_iter().map(Into::into).collect();
        let cluster = self.cluster.as_ref().map(Statuses::status);
        Status { probe_cgroups, cluster, ..status }
    }

    fn bpf_counters(&self) -> BTreeMap<String, u64> {
        self.capture.counters()
    }

    fn certificate_source(&self) -> &'static str {
        self.certificates.source()
    }

    fn certificate(&self, identity: &SpiffeId) -> Option<CertificateDetails> {
        self.certificates.current(identity).map(|svid| svid.describe().into())
    }
}
