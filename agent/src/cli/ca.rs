//! `underpass ca`.

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use kube::{Client, Config};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tracing::info;

use super::{exit::EXIT_CODES, run::Endpoint};
use crate::{
    admin::http,
    ca::{self, Rates, RootSource, ServiceAccount, Settings},
    mesh::{TrustDomain, check_name},
};

/// Longest time for a connection to the API server.
const API_CONNECT: Duration = Duration::from_secs(10);

/// Arguments of `underpass ca`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Runs in a pod of a Deployment, or wherever a kubeconfig leads to the API server. Several
replicas share one root. SIGTERM or SIGINT ends it; what was signed stays valid.

Examples:
  underpass ca --trust-domain cluster.local
  underpass ca --issuer-secret underpass-issuer          the key is cert-manager's
  underpass ca --agent underpass-system/underpass --agent istio-system/ztunnel"))]
pub struct CaArgs {
    /// Trust domain of the identities that are signed.
    #[arg(long, value_name = "NAME", default_value = "cluster.local", env = "UNDERPASS_TRUST_DOMAIN")]
    trust_domain: TrustDomain,
    /// Namespace of this Deployment: its Secret and `ConfigMap` are there [default: the pod's, or the kubeconfig's].
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE")]
    namespace: Option<String>,
    /// `ServiceAccount` of agents, NAME or NAMESPACE/NAME. Can be given several times [default: underpass].
    #[arg(long = "agent", value_name = "ACCOUNT")]
    agents: Vec<String>,
    /// Audience that an agent's token must be for.
    #[arg(long, value_name = "NAME", default_value = "underpass-ca")]
    audience: String,
    /// Secret that holds the root's key. It is filled and rotated by the replicas; annotate it with
    /// underpass.io/rotate-root for a new root.
    #[arg(long, value_name = "NAME", default_value = "underpass-ca", conflicts_with_all = ["issuer_secret", "issuer_dir"])]
    root_secret: String,
    /// Secret that somebody else writes, such as cert-manager, with tls.crt, tls.key and ca.crt. It is only read.
    #[arg(long, value_name = "NAME", conflicts_with = "issuer_dir")]
    issuer_secret: Option<String>,
    /// Directory with files of these names, e.g. a mounted Secret. They are only read.
    #[arg(long, value_name = "DIR")]
    issuer_dir: Option<PathBuf>,
    /// Longest lifetime of a certificate. A new root is distributed for as long before it signs.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = lifetime)]
    lifetime: Duration,
    /// Lifetime of a root that is made here.
    #[arg(long, value_name = "DURATION", default_value = "3650days", value_parser = lifetime)]
    root_lifetime: Duration,
    /// A root that was made here is replaced when less than this is left of it; at least three times --lifetime.
    #[arg(long, value_name = "DURATION", default_value = "365days", value_parser = lifetime)]
    root_replaced_before: Duration,
    /// Address for agents.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15012")]
    listen: SocketAddr,
    /// Host name that agents reach it by. Can be given several times [default: underpass-ca, and with .NAMESPACE,
    /// .NAMESPACE.svc and .NAMESPACE.svc.cluster.local].
    #[arg(long = "dns-name", value_name = "NAME")]
    dns_names: Vec<String>,
    /// `ConfigMap` that the roots are published in; with an empty name nowhere.
    #[arg(long, value_name = "NAME", default_value = "underpass-ca-root")]
    config_map: String,
    /// Further namespaces to publish it in. Can be given several times; each needs a Role.
    #[arg(long = "publish-to", value_name = "NAMESPACE")]
    publish_to: Vec<String>,
    /// Address for the kubelet's probes and for metrics (/healthz/ready, /healthz/live, /metrics), or off.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15021")]
    health_addr: Endpoint,
    /// Certificates per second for one node; twenty seconds' worth at once.
    #[arg(long, value_name = "N", default_value_t = NonZeroU32::new(20).unwrap())]
    rate_per_node: NonZeroU32,
    /// Requests per second from one address; twenty seconds' worth at once.
    #[arg(long, value_name = "N", default_value_t = NonZeroU32::new(50).unwrap())]
    rate_per_address: NonZeroU32,
    /// Requests of agents at once, and as many whose token is still being looked at; more are
    /// refused, and half is one sender's share.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_requests: u32,
    /// Connections at once. When there are more, one on which no agent has shown its token yet
    /// ends.
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_connections: u32,
    /// Pods that are remembered; others are asked for one by one.
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    max_pods: u32,
}

/// Runs the authority until SIGTERM or SIGINT.
pub(super) fn ca(args: CaArgs) -> anyhow::Result<()> {
    super::assemble::harden();
    super::runtime::full()?.block_on(run(args))
}

async fn run(args: CaArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut config = Config::infer()
        .await
        .context("finding the API server; run in a pod with a ServiceAccount, or set KUBECONFIG")?;
    config.connect_timeout = Some(API_CONNECT);
    let (listen, health_addr) = (args.listen, args.health_addr);
    let settings = args.settings(&config.default_namespace)?;
    // The client takes what is installed; everything else here names its own.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let client = Client::try_from(config).context("making a client for the API server")?;
    let listener = http::bind(listen).await.with_context(|| format!("listening on --listen {listen}"))?;
    let health = match health_addr {
        Endpoint::Off => None,
        Endpoint::At(address) => {
            Some(http::bind(address).await.with_context(|| format!("listening on --health-addr {address}"))?)
        }
    };
    let address = |listener: &TcpListener| listener.local_addr().map(|a| a.to_string()).unwrap_or_default();
    info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = address(&listener),
        health = health.as_ref().map(address),
        "running"
    );
    tokio::select! {
        ended = ca::run(settings, client, listener, health) => ended,
        _ = terminate.recv() => { info!("SIGTERM"); Ok(()) }
        _ = interrupt.recv() => { info!("SIGINT"); Ok(()) }
    }
}

impl CaArgs {
    /// Checks what single values cannot say. `namespace` is what the API server's configuration says.
    pub(super) fn settings(self, namespace: &str) -> anyhow::Result<Settings> {
        let namespace = self.namespace.filter(|n| !n.is_empty()).unwrap_or_else(|| namespace.to_owned());
        check_name("namespace", &namespace).context("--namespace")?;
        let agents = if self.agents.is_empty() { vec!["underpass".to_owned()] } else { self.agents };
        let agents = agents.iter().map(|agent| account(agent, &namespace)).collect::<anyhow::Result<_>>()?;
        if self.audience.is_empty() {
            bail!("--audience is empty; name what agents' tokens are made for");
        }
        if self.root_replaced_before < 3 * self.lifetime {
            bail!(
                "--root-replaced-before {} is less than three times --lifetime {}; a root that is replaced later ends before \
                 the last certificate that it signed",
                humantime::format_duration(self.root_replaced_before),
                humantime::format_duration(self.lifetime)
            );
        }
        if self.root_lifetime <= self.root_replaced_before {
            bail!(
                "--root-lifetime {} is not more than --root-replaced-before {}; every root would be replaced at once",
                humantime::format_duration(self.root_lifetime),
                humantime::format_duration(self.root_replaced_before)
            );
        }
        let names =
            ["", &format!(".{namespace}"), &format!(".{namespace}.svc"), &format!(".{namespace}.svc.cluster.local")]
                .map(|suffix| format!("underpass-ca{suffix}"));
        let dns_names = if self.dns_names.is_empty() { names.to_vec() } else { self.dns_names };
        for name in &dns_names {
            check_name("host name", name).context("--dns-name")?;
        }
        let mut publish_to = vec![namespace.clone()];
        for other in self.publish_to {
            check_name("namespace", &other).context("--publish-to")?;
            if !publish_to.contains(&other) {
                publish_to.push(other);
            }
        }
        let root = match (self.issuer_secret, self.issuer_dir) {
            (Some(secret), _) => RootSource::Foreign { secret },
            (None, Some(path)) => RootSource::Directory { path },
            (None, None) => RootSource::Managed { secret: self.root_secret },
        };
        Ok(Settings {
            trust_domain: self.trust_domain,
            namespace,
            audience: self.audience,
            agents,
            root,
            lifetime: self.lifetime,
            root_lifetime: self.root_lifetime,
            root_replaced_before: self.root_replaced_before,
            dns_names,
            config_map: self.config_map,
            publish_to,
            rates: Rates {
                per_node: self.rate_per_node,
                per_address: self.rate_per_address,
                in_flight: self.max_requests as usize,
                connections: self.max_connections as usize,
            },
            max_pods: self.max_pods as usize,
        })
    }
}

fn account(text: &str, namespace: &str) -> anyhow::Result<ServiceAccount> {
    let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
    check_name("namespace", namespace).with_context(|| format!("--agent {text:?}"))?;
    check_name("service account", name).with_context(|| format!("--agent {text:?}"))?;
    Ok(ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() })
}

/// Between two seconds, the resolution of certificates' dates, and a hundred years.
fn lifetime(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|e| format!("{e}; write a number and a unit, like 24h"))?;
    if duration < Duration::from_secs(2) || duration > Duration::from_hours(876_600) {
        return Err("must be 2s to 100years".to_owned());
    }
    Ok(duration)
}
