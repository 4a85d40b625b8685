//! The way from the test's own process into the control plane's namespace.

use std::{
    io,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::namespace::Namespace;

/// How long the server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// Listens on a free port of 127.0.0.1 and carries each connection to a server in a namespace. Dropping it closes everything.
///
/// While the server is away, connections are accepted and closed at once.
#[derive(Debug)]
pub(super) struct Relay {
    address: SocketAddr,
    stopping: Arc<AtomicBool>,
    /// The client's side of open connections.
    open: Arc<Mutex<Vec<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    pub(super) fn start(namespace: &Namespace, to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on 127.0.0.1")?;
        let address = listener.local_addr().context("asking for the port")?;
        let (stopping, open) = (Arc::new(AtomicBool::new(false)), Arc::<Mutex<Vec<TcpStream>>>::default());
        let (stop, list, namespace) = (Arc::clone(&stopping), Arc::clone(&open), namespace.clone());
        let work = move || {
            for client in listener.incoming() {
                if stop.load(Ordering::Acquire) {
                    break;
                }
                // A connection that fails is the client's to notice.
                let Ok(client) = client else { continue };
                let mut open = list.lock().expect("nothing panics while holding it");
                open.retain(|stream| stream.peer_addr().is_ok());
                if let Ok(other) = client.try_clone() {
                    open.push(other);
                }
                drop(open);
                let namespace = namespace.clone();
                thread::spawn(move || carry(&namespace, to, &client));
            }
        };
        let thread = thread::Builder::new().name("relay".into()).spawn(work).context("starting a thread")?;
        Ok(Self { address, stopping, open, thread: Some(thread) })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        // Wakes the thread, which looks whether it should stop.
        if TcpStream::connect(self.address).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
        for stream in self.open.lock().expect("nothing panics while holding it").drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Carries one connection to a server in a namespace, until both ends have had enough.
pub fn carry(namespace: &Namespace, to: SocketAddr, client: &TcpStream) {
    if let Ok(Ok(server)) = namespace.enter(|| TcpStream::connect_timeout(&to, CONNECT)) {
        thread::scope(|scope| {
            scope.spawn(|| copy(client, &server));
            copy(&server, client);
        });
    }
    // Errors: the other side was faster.
    let _ = client.shutdown(Shutdown::Both);
}

/// Carries one direction; its end, also a bad one, is passed on.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let clean = io::copy(&mut from, &mut to).is_ok();
    let _ = to.shutdown(if clean { Shutdown::Write } else { Shutdown::Both });
    if !clean {
        let _ = from.shutdown(Shutdown::Both);
    }
}
