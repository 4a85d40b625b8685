//! How an agent ends: told to, followed by another one, or because Underpass is removed from the node.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Notify,
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, sleep_until},
};
use tracing::{info, warn};

use super::plugin;
use crate::{
    admin::http::Health,
    capture::{Capture, cleanup},
    cli::RunArgs,
    cni,
    handover::{self, Predecessor, Successor, Successors},
    identity::kept,
    proxy::Reconciler,
    relay::{ConnectionTable, Relay},
    sources::{self, kubernetes::Leaving},
};

/// How often live connections are counted while the agent waits for their end.
const LOOK: Duration = Duration::from_millis(50);

/// The signals that end an agent; heard from the start on.
pub(super) struct Ending {
    terminate: Signal,
    interrupt: Signal,
}

/// A running agent.
pub(super) struct Parts {
    /// What another agent on the node must not do at the same time: sockets, ports.
    pub(super) front: JoinSet<()>,
    /// The same of the CNI plugin.
    pub(super) cni: JoinSet<()>,
    /// What goes on until the end.
    pub(super) tasks: JoinSet<()>,
    pub(super) successors: Option<Successors>,
    pub(super) capture: Arc<Capture>,
    pub(super) reconciler: Arc<Reconciler>,
    pub(super) table: Arc<ConnectionTable>,
    pub(super) relay: Arc<Relay>,
    pub(super) quit: Arc<Notify>,
    pub(super) leaving: Option<Arc<Leaving>>,
    pub(super) health: Arc<Health>,
}

/// Why an agent stops doing what it did.
enum Why {
    Told,
    Followed(Successor),
    Removed,
}

impl Ending {
    pub(super) fn prepare() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("listening for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listening for SIGINT")?,
        })
    }

    async fn told(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => info!("SIGTERM"),
            _ = self.interrupt.recv() => info!("SIGINT"),
        }
    }

    /// Waits for the end of a running agent, and brings it about.
    pub(super) async fn run(mut self, args: &RunArgs, mut parts: Parts) -> anyhow::Result<()> {
        let why = tokio::select! {
            () = self.told() => Why::Told,
            () = parts.quit.notified() => Why::Told,
            successor = next(parts.successors.as_ref()) => Why::Followed(successor),
            () = removed(parts.leaving.as_deref()) => Why::Removed,
        };
        match why {
            Why::Removed => return self.removed(args, parts).await,
            Why::Followed(successor) => {
                let successor = parts.hand_over(successor).await?;
                tokio::select! {
                    // Both may have come; being told counts.
                    biased;
                    () = self.told() => {}
                    () = alone(successor, args) => bail!("the agent that had taken over has gone; this one has to be started again"),
                }
                self.drain(args.drain_timeout, &mut parts, false).await?;
            }
            Why::Told if args.cleanup_on_exit => {}
            Why::Told => self.drain(args.drain_timeout, &mut parts, true).await?,
        }
        if args.cleanup_on_exit {
            // Whatever is being done to a pod is brought to its end.
            parts.reconciler.retire().await;
        }
        parts.stop().await;
        let Parts { capture, reconciler, relay, successors, .. } = parts;
        let followed = successors.is_none();
        if args.cleanup_on_exit && !followed {
            capture.leave_nothing();
            reconciler.unenrol_all().await;
        }
        spawn_blocking(move || relay.shutdown()).await.context("stopping the relay")?;
        if followed {
            info!("the agent that has taken over goes on");
        } else if args.cleanup_on_exit {
            capture.remove_reply_routes().await;
            drop((reconciler, capture));
            let report = cleanup::cleanup(&args.pin_root, &[], true).await.context("removing pins")?;
            info!(?report, "pods have plain traffic again");
        } else {
            info!(
                "pods stay captured: their connections are refused until an agent runs again (see `underpass cleanup`)"
            );
        }
        Ok(())
    }

    /// Serves on until there is no connection any more, at most for `limit`, or until it is told once more. Another agent may come
    /// and take over meanwhile.
    async fn drain(&mut self, limit: Duration, parts: &mut Parts, mut serving: bool) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        loop {
            let live = parts.table.len();
            if live == 0 || Instant::now() >= end {
                if live > 0 && !limit.is_zero() {
                    warn!(live, "connections are reset: they lasted longer than --drain-timeout");
                }
                return Ok(());
            }
            tokio::select! {
                // Nothing tells that the last connection has ended.
                () = sleep(LOOK) => {}
                () = sleep_until(end) => {}
                () = self.told() => return Ok(()),
                successor = next(parts.successors.as_ref()), if serving => {
                    // It watches this process' end no more than this one watches its.
                    drop(parts.hand_over(successor).await?);
                    serving = false;
                }
            }
        }
    }

    /// Underpass is being removed from the node: gives everything back, and stays without doing anything until it is told to end. So the
    /// supervisor does not start it again.
    async fn removed(mut self, args: &RunArgs, mut parts: Parts) -> anyhow::Result<()> {
        info!("Underpass is being removed: giving everything back");
        parts.health.leave("Underpass is being removed from this node");
        // The plugin first: no pod may wait for an agent that does not answer any more.
        parts.cni.shutdown().await;
        if args.cni {
            let installer = plugin::installer(args)?;
            let removed = spawn_blocking(move || installer.remove()).await.context("removing the CNI plugin")?;
            match removed {
                Ok(removed) => info!(?removed, "the CNI plugin is removed"),
                Err(error) => {
                    warn!(%error, "the CNI plugin is not removed; take it out of the node's configuration by hand");
                }
            }
        }
        // Whatever is being done to a pod is brought to its end.
        parts.reconciler.retire().await;
        parts.tasks.shutdown().await;
        parts.successors = None;
        parts.capture.leave_nothing();
        parts.reconciler.unenrol_all().await;
        // Connections that were made through the mesh end by themselves, or with the agent.
        self.drain(args.drain_timeout, &mut parts, false).await?;
        // What answers probes goes on: the kubelet is told that the agent is well, and not ready.
        let Parts { front, capture, reconciler, relay, leaving, .. } = parts;
        spawn_blocking(move || relay.shutdown()).await.context("stopping the relay")?;
        capture.remove_reply_routes().await;
        drop((reconciler, capture, leaving));
        let report = cleanup::cleanup(&args.pin_root, &[], true).await.context("removing pins")?;
        for (what, removed) in [
            ("what was between agent and CNI plugin", cni::remove(&args.run_dir)),
            ("what is kept of certificates", kept::remove_all(&args.run_dir)),
            ("the socket for an agent that follows", handover::remove(&args.run_dir)),
            ("the last good configuration", sources::forget(&args.state_dir)),
        ] {
            if let Err(error) = removed {
                warn!(%error, "cannot remove {what}");
            }
        }
        info!(?report, "nothing of Underpass is left on this node");
        self.told().await;
        drop(front);
        Ok(())
    }
}

impl Parts {
    /// Lets another agent take over; live connections stay here.
    async fn hand_over(&mut self, successor: Successor) -> anyhow::Result<Successor> {
        info!(pid = successor.pid, "another agent takes over");
        self.successors = None;
        self.cni.shutdown().await;
        self.front.shutdown().await;
        self.reconciler.retire().await;
        let listening = self.capture.retire().await.context("sharing the pods' listeners")?;
        let successor = successor.hand(listening).await.context(
            "the agent that was taking over has failed; this one has let go of the node and has to be started again",
        )?;
        self.capture.stop_accepting();
        info!(live = self.table.len(), "another agent has taken over; live connections go on here");
        Ok(successor)
    }

    async fn stop(&mut self) {
        // Nothing may be enrolled again from here on.
        self.cni.shutdown().await;
        self.front.shutdown().await;
        self.tasks.shutdown().await;
    }
}

/// The next agent; never when there is one already.
async fn next(successors: Option<&Successors>) -> Successor {
    match successors {
        Some(successors) => successors.next().await,
        None => std::future::pending().await,
    }
}

/// Resolves when the agent that took over has gone and was not followed by another one itself.
async fn alone(successor: Successor, args: &RunArgs) {
    successor.gone().await;
    if matches!(Predecessor::find(&args.run_dir), Ok(Some(_))) {
        std::future::pending::<()>().await;
    }
}

async fn removed(leaving: Option<&Leaving>) {
    match leaving {
        Some(leaving) => leaving.gone().await,
        None => std::future::pending().await,
    }
}
