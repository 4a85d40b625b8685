//! Accept loops with the per-pod bounds.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tracing::{debug, warn};

use super::{PodContext, inbound, outbound, plaintext};
use crate::{capture::inheritance::Purpose, telemetry::RefusalReason};

/// How long the listeners of a purpose rest when the process is out of descriptors or memory: nothing signals their return.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// Starts the loop of a purpose. Its listeners share it, as a node has a thousand pods, each with more than a dozen of them, and the
/// pod's bound on pending connections, so the kernel's backlog is where a flood waits, not the agent's memory.
pub(super) fn run(context: &Arc<PodContext>, listeners: Vec<Arc<TcpListener>>, purpose: Purpose) {
    tokio::spawn(accept_loop(Arc::clone(context), Listeners { all: listeners, turn: 0 }, purpose));
}

async fn accept_loop(context: Arc<PodContext>, mut listeners: Listeners, purpose: Purpose) {
    let pending = Arc::new(Semaphore::new(context.proxy.limits.pending_per_pod));
    let unenrolled = context.pod.unenrolled();
    tokio::pin!(unenrolled);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut unenrolled => return,
            accepted = listeners.next(&pending) => accepted,
        };
        match accepted {
            Ok((stream, peer, permit)) => admit(&context, purpose, stream, peer, permit),
            Err(e) if is_exhaustion(&e) => {
                warn!(pod = %context.pod.key, error = %e, "cannot accept; raise the descriptor limit (LimitNOFILE)");
                context.proxy.counters.refuse(RefusalReason::Resources);
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
            // The peer gave up between SYN and accept; everything else here is per-connection too (accept(2)).
            Err(e) => debug!(pod = %context.pod.key, error = %e, "accept"),
        }
    }
}

/// Those of one purpose.
struct Listeners {
    all: Vec<Arc<TcpListener>>,
    /// Which is looked at first.
    turn: usize,
}

impl Listeners {
    /// The next connection, once there may be one more that is pending.
    async fn next(&mut self, pending: &Arc<Semaphore>) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let permit = Arc::clone(pending).acquire_owned().await.expect("the semaphore is never closed");
        let (stream, peer) = poll_fn(|context| self.poll(context)).await?;
        Ok((stream, peer, permit))
    }

    /// By turns, so that a busy listener does not keep the others waiting.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        for _ in 0..self.all.len() {
            let listener = &self.all[self.turn % self.all.len()];
            self.turn = (self.turn + 1) % self.all.len();
            if let Poll::Ready(accepted) = listener.poll_accept(context) {
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    }
}

/// Starts the connection's task, or resets it when the pod has all the connections it may have.
fn admit(
    context: &Arc<PodContext>,
    purpose: Purpose,
    stream: TcpStream,
    peer: SocketAddr,
    pending: OwnedSemaphorePermit,
) {
    let Ok(slot) = Arc::clone(&context.connections).try_acquire_owned() else {
        context.proxy.counters.refuse(RefusalReason::PodLimit);
        debug!(pod = %context.pod.key, %peer, "refused: the pod has its maximum of connections");
        reset(stream);
        return;
    };
    let context = Arc::clone(context);
    match purpose {
        Purpose::Outbound => drop(tokio::spawn(async move {
            outbound::serve(&context, stream, peer, slot).await;
            drop(pending);
        })),
        Purpose::Tunnel => drop(tokio::spawn(async move {
            inbound::serve(&context, stream, peer, slot).await;
            drop(pending);
        })),
        Purpose::Plaintext => drop(tokio::spawn(async move {
            plaintext::serve(&context, stream, peer, slot).await;
            drop(pending);
        })),
    }
}

/// Closes with a reset, never with a clean end.
pub(super) fn reset(stream: TcpStream) {
    if let Err(e) = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)) {
        debug!(error = %e, "setting SO_LINGER");
    }
    drop(stream);
}

fn is_exhaustion(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
