//! Following an agent that still runs.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use crate::{
    capture::inheritance::Inheritance, cli::RunArgs, handover::Predecessor, identity::CertificateStore, mesh::MeshStore,
};

/// How long this agent may take to know the mesh, with another one that goes on meanwhile.
const KNOWN: Duration = Duration::from_mins(1);
/// How long certificates are waited for. A connection whose certificate is still missing then waits for it itself.
const CERTIFICATES: Duration = Duration::from_secs(10);

/// Looks for the agent that is to be followed.
pub(super) fn look(args: &RunArgs) -> anyhow::Result<Option<Predecessor>> {
    if !args.take_over {
        return Ok(None);
    }
    Predecessor::find(&args.run_dir)
        .with_context(|| format!("asking the agent with --run-dir {}", args.run_dir.display()))
}

/// Takes over when this agent knows the mesh and has certificates.
pub(super) async fn take_over(
    predecessor: Predecessor,
    mesh: &MeshStore,
    certificates: &Arc<CertificateStore>,
) -> anyhow::Result<(Inheritance, Predecessor)> {
    info!("another agent runs; taking over from it as soon as the mesh is known");
    let mut generations = mesh.subscribe();
    timeout(KNOWN, generations.wait_for(|generation| *generation > 0))
        .await
        .with_context(|| {
            format!("the mesh is not known after {KNOWN:?}: the agent that runs goes on, and this one ends")
        })?
        .context("the source of the mesh has ended")?;
    let wanted = mesh.load().local_identities();
    certificates.want(wanted.clone());
    let end = Instant::now() + CERTIFICATES;
    for identity in wanted {
        if certificates.wait_for(&identity, end.saturating_duration_since(Instant::now())).await.is_none() {
            warn!(%identity, "no certificate yet; taking over nevertheless");
        }
    }
    predecessor.take_over().await.context("taking over from the agent that runs")
}

/// Everything that was its is accepted here now. It notices the end of what is returned.
pub(super) async fn serving(predecessor: Predecessor) -> anyhow::Result<impl Sized> {
    let connection = predecessor.serving().await.context("telling the agent before that this one serves")?;
    info!("took over; the agent before keeps its live connections");
    Ok(connection)
}
