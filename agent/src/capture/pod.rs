//! An enrolled pod.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use socket2::Socket;
use tokio::net::TcpListener;

use crate::mesh::{SpiffeId, WorkloadKey};

/// The agent's listeners inside a pod's namespace, non-blocking. Accepted sockets of `outbound` carry `SO_LINGER {1,0}` from birth.
#[derive(Debug, Default)]
pub struct PodListeners {
    /// Port 15001: `0.0.0.0` and, with IPv6, `[::1]` on every port of [`underpass_abi::OUTBOUND_PORTS_V6`].
    pub outbound: Vec<TcpListener>,
    /// Port 15008 on every address, both families.
    pub tunnel: Vec<TcpListener>,
    /// Port 15006 (transparent), for plaintext that a policy has to see.
    pub plaintext: Vec<TcpListener>,
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
}

impl Pod {
    /// The listeners; yields them once, to whoever runs the accept loops.
    pub fn take_listeners(&self) -> Option<PodListeners> {
        todo!()
    }

    /// Resolves when the pod was un-enrolled: accept loops end.
    pub async fn unenrolled(&self) {
        todo!()
    }

    /// An unconnected, non-blocking TCP socket inside the pod for dialling upstreams, flagged as the agent's. Comes from a pool that
    /// is refilled in batches by a worker thread.
    pub async fn upstream_socket(&self, to: IpAddr) -> io::Result<Socket> {
        let _ = to;
        todo!()
    }

    /// A socket inside the pod bound transparently to `source` (port 0, `IP_BIND_ADDRESS_NO_PORT`), marked for the reply route, with
    /// `SO_LINGER {1,0}`: for connecting to the application as the original client.
    pub async fn application_socket(&self, source: IpAddr) -> io::Result<Socket> {
        let _ = (source, None::<SocketAddr>);
        todo!()
    }
}
