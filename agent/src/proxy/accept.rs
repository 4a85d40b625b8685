//! Accept loops with the per-pod bounds.

use std::{
    future::poll_fn,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use super::{Holder, PodContext, inbound, outbound, plaintext};
use crate::{
    bounds::{self, Entry},
    capture::inheritance::Purpose,
    telemetry::RefusalReason,
};

/// How long the listeners of a purpose rest when the process is out of descriptors or memory: nothing signals their return.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// Starts the loop of a purpose. Its listeners share it, as a node has a thousand pods, each with
/// more than a dozen of them.
///
/// A loop accepts whatever comes, because what waits in the kernel's queue waits behind everybody
/// before it. What an accepted connection may take is bounded where it is known whose it is: a
/// tunnel's handshake by the peer's address, an outbound connection by its destination, plaintext
/// by the client's address.
pub(super) fn run(context: &Arc<PodContext>, listeners: Vec<Arc<TcpListener>>, purpose: Purpose) {
    tokio::spawn(accept_loop(Arc::clone(context), Listeners { all: listeners, turn: 0 }, purpose));
}

async fn accept_loop(context: Arc<PodContext>, mut listeners: Listeners, purpose: Purpose) {
    let unenrolled = context.pod.unenrolled();
    tokio::pin!(unenrolled);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut unenrolled => return,
            accepted = next(&context, &mut listeners, purpose) => accepted,
        };
        match accepted {
            Ok(accepted) => start(&context, accepted),
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

/// A connection, and what it may do next.
enum Accepted {
    Outbound(TcpStream, SocketAddr),
    Tunnel(TcpStream, SocketAddr, Entry<IpAddr>),
    Plaintext(TcpStream, SocketAddr),
}

/// The next connection. A tunnel gets a place for its handshake, for which a peer that has been
/// silent may have to go.
async fn next(context: &PodContext, listeners: &mut Listeners, purpose: Purpose) -> io::Result<Accepted> {
    let (stream, peer) = poll_fn(|context| listeners.poll(context)).await?;
    Ok(match purpose {
        Purpose::Outbound => Accepted::Outbound(stream, peer),
        Purpose::Tunnel => {
            let entry = context.handshakes.enter(&bounds::source(peer.ip())).await;
            Accepted::Tunnel(stream, peer, entry)
        }
        Purpose::Plaintext => Accepted::Plaintext(stream, peer),
    })
}

/// The listeners of one purpose.
struct Listeners {
    all: Vec<Arc<TcpListener>>,
    /// Which is looked at first.
    turn: usize,
}

impl Listeners {
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

/// Starts the connection's task.
fn start(context: &Arc<PodContext>, accepted: Accepted) {
    let context = Arc::clone(context);
    match accepted {
        Accepted::Outbound(stream, client) => {
            drop(tokio::spawn(async move { outbound::serve(&context, stream, client).await }));
        }
        Accepted::Tunnel(stream, peer, entry) => {
            drop(tokio::spawn(async move { inbound::serve(&context, stream, peer, entry).await }));
        }
        Accepted::Plaintext(stream, peer) => {
            match context.plaintext.try_enter(Holder::Address(bounds::source(peer.ip()))) {
                Some(place) => {
                    drop(tokio::spawn(async move { plaintext::serve(&context, stream, peer, place).await }));
                }
                None => full(&context, stream, peer),
            }
        }
    }
}

/// Resets a connection that there is no place for.
pub(super) fn full(context: &PodContext, stream: TcpStream, peer: SocketAddr) {
    context.proxy.counters.refuse(RefusalReason::PodLimit);
    debug!(pod = %context.pod.key, %peer, "refused: the pod has its maximum of connections");
    reset(stream);
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
