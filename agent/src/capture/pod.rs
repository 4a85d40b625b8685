//! An enrolled pod.

mod pool;

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use socket2::{Domain, Socket};
use tokio::{net::TcpListener, sync::watch};
use tracing::{debug, warn};

use self::pool::Pool;
use super::{
    inheritance::{Listening, Purpose},
    kept::Reason,
    netns::Netns,
    routes, sockdiag,
    sockets::{self, Mark},
};
use crate::mesh::{SpiffeId, WorkloadKey};

/// The agent's listeners inside a pod's namespace, non-blocking. Accepted sockets of `outbound` carry `SO_LINGER {1,0}` from birth.
#[derive(Clone, Debug, Default)]
pub struct PodListeners {
    /// Port 15001: `0.0.0.0` and, with IPv6, `[::1]` on every port of [`underpass_abi::OUTBOUND_PORTS_V6`].
    pub outbound: Vec<Arc<TcpListener>>,
    /// Port 15008 on every address, both families.
    pub tunnel: Vec<Arc<TcpListener>>,
    /// Port 15006 (transparent), for plaintext that a policy has to see.
    pub plaintext: Vec<Arc<TcpListener>>,
}

impl PodListeners {
    /// Those for one purpose.
    pub(super) fn of(&mut self, purpose: Purpose) -> &mut Vec<Arc<TcpListener>> {
        match purpose {
            Purpose::Outbound => &mut self.outbound,
            Purpose::Tunnel => &mut self.tunnel,
            Purpose::Plaintext => &mut self.plaintext,
        }
    }
}

/// What a [`Pod`] is made of.
pub struct NewPod {
    /// Number in the BPF maps.
    pub id: u32,
    /// Which workload.
    pub key: WorkloadKey,
    /// Its identity.
    pub identity: SpiffeId,
    /// Its namespace, with the reply route installed ([`routes::install`]): the pod removes it.
    pub netns: Arc<Netns>,
    /// The listeners in it.
    pub listeners: PodListeners,
    /// Flags a socket as the agent's own.
    pub mark: Arc<Mark>,
}

/// An enrolled pod: its number, and sockets inside its namespace. Dropping the last reference undoes the reply route.
pub struct Pod {
    /// Number in the BPF maps.
    pub id: u32,
    /// Which workload.
    pub key: WorkloadKey,
    /// Its identity.
    pub identity: SpiffeId,
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// Path of its namespace.
    pub netns: PathBuf,
    namespace: Arc<Netns>,
    /// Until they are taken.
    listeners: Mutex<Option<PodListeners>>,
    /// As long as the pod is enrolled.
    open: Mutex<PodListeners>,
    unenrolled: watch::Sender<bool>,
    /// Why everything is refused, while it is.
    kept: Mutex<Option<Reason>>,
    upstream: Pools,
    application: Pools,
}

/// A pool for each family.
struct Pools {
    v4: Arc<Pool>,
    v6: Arc<Pool>,
}

impl Pools {
    fn new(new: &NewPod, make: fn(Domain, &Mark) -> io::Result<Socket>) -> Self {
        let pool = |domain| {
            let mark = Arc::clone(&new.mark);
            Pool::new((*new.netns).clone(), move || make(domain, &*mark))
        };
        Self { v4: pool(Domain::IPV4), v6: pool(Domain::IPV6) }
    }

    async fn take(&self, family_of: IpAddr) -> io::Result<Socket> {
        if family_of.is_ipv4() { self.v4.take().await } else { self.v6.take().await }
    }
}

impl Pod {
    /// Takes over what enrolment prepared.
    pub fn new(new: NewPod) -> Arc<Self> {
        Arc::new(Self {
            upstream: Pools::new(&new, sockets::upstream),
            application: Pools::new(&new, sockets::application),
            id: new.id,
            key: new.key,
            identity: new.identity,
            netns_cookie: new.netns.cookie(),
            netns: new.netns.path().to_owned(),
            namespace: new.netns,
            open: Mutex::new(new.listeners.clone()),
            listeners: Mutex::new(Some(new.listeners)),
            unenrolled: watch::Sender::new(false),
            kept: Mutex::new(None),
        })
    }

    /// The listeners; yields them once, to whoever runs the accept loops.
    pub fn take_listeners(&self) -> Option<PodListeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The open listeners once more, for another agent to take up.
    pub(super) fn listening(&self) -> io::Result<Listening> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut sockets = Vec::new();
        for purpose in [Purpose::Outbound, Purpose::Tunnel, Purpose::Plaintext] {
            for listener in open.of(purpose) {
                sockets.push((purpose, listener.as_fd().try_clone_to_owned()?));
            }
        }
        Ok(Listening { netns: self.netns_cookie, sockets })
    }

    /// Ends the accept loops. Connections, and the sockets they need, go on. Listeners nobody took are closed.
    pub fn signal_unenrolled(&self) {
        drop(self.take_listeners());
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = PodListeners::default();
        self.unenrolled.send_replace(true);
    }

    /// From now on every connection is refused for this reason; with `None` no longer.
    pub(super) fn keep(&self, reason: Option<Reason>) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// Why every connection is refused: the pod vanished and is kept.
    pub fn kept(&self) -> Option<Reason> {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Device and inode number of its namespace, which name it while this value lives.
    pub fn namespace_id(&self) -> (u64, u64) {
        self.namespace.id()
    }

    /// Resolves when the pod was un-enrolled: accept loops end.
    pub async fn unenrolled(&self) {
        // The sender is part of self and cannot go away meanwhile.
        let _ = self.unenrolled.subscribe().wait_for(|unenrolled| *unenrolled).await;
    }

    /// An unconnected, non-blocking TCP socket inside the pod for dialling upstreams, flagged as the agent's. Comes from a pool that
    /// is refilled in batches by a worker thread.
    pub async fn upstream_socket(&self, to: IpAddr) -> io::Result<Socket> {
        self.upstream.take(to.to_canonical()).await
    }

    /// A socket inside the pod bound transparently to `source` (port 0, `IP_BIND_ADDRESS_NO_PORT`), marked for the reply route, with
    /// `SO_LINGER {1,0}`: for connecting to the application as the original client.
    pub async fn application_socket(&self, source: IpAddr) -> io::Result<Socket> {
        let source = source.to_canonical();
        let socket = self.application.take(source).await?;
        sockets::bind_to_client(&socket, source)?;
        Ok(socket)
    }
}

impl Pod {
    /// Sees to it that the application at `application` does not wait for a `client` whose connection the agent has closed with a
    /// reset that may have been lost.
    pub async fn end_abandoned(&self, application: SocketAddr, client: SocketAddr) {
        match sockdiag::end_abandoned(&self.namespace, application, client).await {
            Ok(false) => {}
            Ok(true) => {
                debug!(pod = %self.key, %application, %client, "a reset was lost: the application's socket is ended");
            }
            Err(error) => {
                warn!(pod = %self.key, %application, %client, %error, "an application may not know that its connection is over");
            }
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        routes::remove_detached(&self.namespace);
    }
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod")
            .field("id", &self.id)
            .field("key", &self.key)
            .field("identity", &self.identity)
            .field("netns", &self.netns)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "netns_tests/pod.rs"]
mod tests;
