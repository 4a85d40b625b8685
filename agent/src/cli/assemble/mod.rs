//! Puts the agent together out of its parts, and takes it apart again.

mod ending;
mod issuer;
mod node;
mod plugin;
mod predecessor;

use std::sync::Arc;

use anyhow::Context as _;
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
    signal::{SigSet, Signal},
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};
use tracing::{info, warn};

use self::{
    ending::{Ending, Parts},
    issuer::{issuer, revocations},
    node::NodeStatus,
};
use super::{
    RunArgs,
    ports::Ports,
    run::{KtlsMode, Resumption, Switch},
};
use crate::{
    admin::{
        http::{NodeView, View},
        server::{self, AdminState},
    },
    capture::{Capture, CaptureOptions, inheritance::Inheritance},
    handover::Successors,
    identity::CertificateStore,
    mesh::{MeshStore, Snapshot},
    proxy::{Enforcement, Limits, Proxy, Reconciler},
    relay::{ConnectionTable, Relay, RelayOptions},
    sources::{file::FileSource, kubernetes::KubernetesSource},
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
    super::runtime::full()?.block_on(agent(args, access))
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
    let ending = Ending::prepare()?;

    let cgroup = super::cgroup::attach_point(args.cgroup.as_deref())?;
    let (source, config) = FileSource::open(&args.config, &args.state_dir, args.node.as_deref())?;
    // What another agent on this node must not do at the same time, and what goes on beside one that has taken over.
    let (mut front, mut cni, mut tasks) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
    let reload = source.stats();
    let cluster = if let Some(kubernetes) = &config.kubernetes {
        let source = KubernetesSource::new(kubernetes, &config.snapshot.node, &cgroup, &args.state_dir).await?;
        Some(plugin::wired(source, &args).await?)
    } else {
        plugin::refuse_without_kubernetes(&args)?;
        None
    };
    let cluster_status = cluster.as_ref().map(KubernetesSource::statuses);
    let attachments = cluster.as_ref().map(KubernetesSource::attachments);
    let leaving = cluster.as_ref().map(KubernetesSource::leaving);
    let (issuer, prepare) = issuer(&config, &args.run_dir)?;
    let revocations = revocations(&config, args.crl_file.as_deref())?;
    let trust_domain = config.snapshot.trust_domain.clone();
    let mesh = Arc::new(MeshStore::new(Snapshot::empty(&config.snapshot.node, trust_domain.clone())));
    let certificates = CertificateStore::new(issuer);
    let ktls = kernel_tls(args.ktls).await;

    tasks.spawn(Arc::clone(&certificates).run());
    tasks.spawn(Arc::clone(&revocations).follow(Arc::clone(&certificates)));
    let from_file = cluster.is_none();
    // What the file changes: the mesh itself, or only the settings that hold for what the cluster says.
    let watched = match cluster {
        None => {
            mesh.replace(config.snapshot);
            Arc::clone(&mesh)
        }
        Some(cluster) => {
            let base = Arc::new(MeshStore::new(config.snapshot));
            tasks.spawn(cluster.run(Arc::clone(&base), Arc::clone(&mesh)));
            base
        }
    };
    tasks.spawn(async move {
        if let Err(e) = source.watch(watched).await {
            warn!(error = %e, "the configuration is not watched any more; changes need a restart");
        }
    });

    // An agent that runs goes on until this one knows all that it needs.
    let (inheritance, before) = match predecessor::look(&args)? {
        Some(before) => {
            let (inheritance, before) = predecessor::take_over(before, &mesh, &certificates).await?;
            if let Some(attachments) = &attachments {
                plugin::recall_latest(&args, attachments).await?;
            }
            (inheritance, Some(before))
        }
        None => (Inheritance::default(), None),
    };

    let mut ports = Ports::open(&args).await?;
    let health = ports.answer_probes(&mut front);
    let table = ConnectionTable::new();
    let telemetry = Telemetry::new(args.max_series as usize, access);
    let counters = Arc::clone(&telemetry.counters);
    let relay_options = RelayOptions { threads: args.relay_threads.unwrap_or(0).into(), ..RelayOptions::default() };
    let relay =
        Relay::start(&relay_options, Arc::clone(&table), Arc::clone(&counters)).context("starting the relay")?;
    let capture = Capture::start(CaptureOptions {
        cgroup,
        pin_root: args.pin_root.clone(),
        tc: args.tc,
        mesh_entries: args.mesh_entries(),
        bpf_log: args.bpf_log,
        inheritance: inheritance.clone(),
    })
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
                revocations: Arc::clone(&revocations),
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
    tasks.spawn(Arc::clone(&proxy).end_revoked());
    let reconciler = Reconciler::new(proxy, prepare);
    tasks.spawn(super::memory::give_back(Arc::clone(&table), Arc::clone(&reconciler)));
    let known = follow(Arc::clone(&mesh), Arc::clone(&reconciler), Arc::clone(&capture));
    let followed = Arc::clone(&reconciler);
    if from_file || before.is_some() {
        if let Some(generations) = known.await {
            tasks.spawn(followed.run(generations));
        }
    } else {
        tasks.spawn(async move {
            if let Some(generations) = known.await {
                followed.run(generations).await;
            }
        });
    }
    inheritance.close();
    let _before = match before {
        Some(before) => Some(predecessor::serving(before).await?),
        None => None,
    };

    let provider = Arc::new(NodeStatus {
        reconciler: Arc::clone(&reconciler),
        certificates: Arc::clone(&certificates),
        capture: Arc::clone(&capture),
        relay: Arc::clone(&relay),
        reload,
        cluster: cluster_status,
        revocations,
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
    ports.answer(&mut front, &view, &quit);
    let socket = super::admin_socket(&args.run_dir);
    let admin = server::serve(&socket, AdminState { table: Arc::clone(&table), counters, mesh, provider })
        .with_context(|| format!("opening the admin socket {}", socket.display()))?;
    front.spawn(admin);
    if let Some(attachments) = attachments {
        plugin::start(&mut cni, &args, attachments, &reconciler)?;
    }
    let successors = Successors::listen(&args.run_dir).context("opening the socket for an agent that follows")?;
    let health_view = view.clone();
    front.spawn(Arc::clone(&health).watch(health_view));
    info!(version = env!("CARGO_PKG_VERSION"), "running");

    ending
        .run(
            &args,
            Parts {
                front,
                cni,
                tasks,
                successors: Some(successors),
                capture,
                reconciler,
                table,
                relay,
                quit,
                leaving,
                health,
            },
        )
        .await
}

/// Makes the node what the first snapshot says, once there is one: until then the pods that an earlier agent captured stay as they
/// are. What comes later is told by the generations that are returned; `None` when there never was a snapshot.
async fn follow(
    mesh: Arc<MeshStore>,
    reconciler: Arc<Reconciler>,
    capture: Arc<Capture>,
) -> Option<watch::Receiver<u64>> {
    let mut generations = mesh.subscribe();
    generations.wait_for(|generation| *generation > 0).await.ok()?;
    reconciler.reconcile().await;
    capture.collect_garbage().await;
    reconciler.look_soon();
    Some(generations)
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
