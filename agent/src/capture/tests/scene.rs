//! One pod with a peer, and what can be seen of its traffic.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, LazyLock},
    time::Duration,
};

use testbed::pace::patience;
use tokio::time::timeout;

use super::{
    super::{Capture, Pod, PodListeners, TcMode, netns::Netns},
    lab::{Connected, Lab, Net, PEER, PEER6, POD, ip, snapshot, tool, until},
    workload,
};
use crate::mesh::{MeshSettings, Workload};

/// A port of no agent.
pub const PORT: u16 = 8080;
pub static SOON: LazyLock<Duration> = LazyLock::new(|| patience(Duration::from_secs(20)));

/// A lab with one pod, whose peer is in the mesh and listens in plaintext.
pub struct Scene {
    pub listeners: Vec<TcpListener>,
    pub net: Net,
    pub web: Workload,
    pub lab: Lab,
}

impl Scene {
    pub async fn new() -> Self {
        let lab = Lab::new();
        let net = lab.pod("pod");
        let web = workload("web", POD, Some(&net.path()));
        let mut listeners = Vec::new();
        for (namespace, address) in [(&net.peer, PEER), (&net.peer, PEER6), (&net.pod, POD)] {
            listeners.push(listen(namespace, address).await);
        }
        Self { listeners, net, web, lab }
    }

    /// Starts, and puts the peer into the mesh.
    pub async fn start(&self, tc: TcMode) -> Arc<Capture> {
        let capture = self.lab.start_with(tc).await;
        self.apply(&capture);
        capture
    }

    pub fn apply(&self, capture: &Capture) {
        let mut peer = workload("peer", PEER, None);
        peer.addresses.push(PEER6.parse().unwrap());
        capture.apply(&snapshot(MeshSettings::default(), vec![self.web.clone(), peer])).unwrap();
    }

    pub async fn dial(&self, in_pod: bool) -> Connected {
        self.lab.connects(&self.net.pod, in_pod, PEER, PORT).await
    }

    pub async fn dial_from_peer(&self) -> Connected {
        self.lab.connects(&self.net.peer, false, POD, PORT).await
    }

    /// How many connections arrived in plaintext since the last call.
    pub fn arrived(&self) -> usize {
        self.listeners.iter().map(|l| std::iter::from_fn(|| l.accept().ok()).count()).sum()
    }

    /// Plain traffic in both directions, and nothing of ours in the namespace or pinned.
    pub async fn assert_plain(&self) {
        assert_eq!(self.dial(true).await, Connected::Yes);
        assert_eq!(self.dial(false).await, Connected::Yes);
        assert_eq!(self.dial_from_peer().await, Connected::Yes);
        assert_eq!(self.arrived(), 3);
        assert_eq!(self.tc_links(), 0);
        self.assert_no_rule();
        assert_eq!(self.filters(), 0);
    }

    /// Somebody undoes the reply route soon.
    pub async fn no_rule(&self) {
        until("the reply route is gone", || !self.has_rule()).await;
    }

    pub fn assert_no_rule(&self) {
        assert!(!self.has_rule());
    }

    pub fn has_rule(&self) -> bool {
        ip(&format!("-n {} rule show", self.net.pod)).contains("0x539")
    }

    pub fn tc_links(&self) -> usize {
        self.lab.links().keys().filter(|k| k.starts_with("tc-")).count()
    }

    /// Programs on the pod's interface, attached in whichever way this kernel has.
    pub fn attached(&self) -> usize {
        self.tc_links() + self.filters()
    }

    /// clsact filters of ours.
    pub fn filters(&self) -> usize {
        let show = |hook| tool("tc", &format!("-n {} filter show dev eth0 {hook}", self.net.pod));
        ["ingress", "egress"].map(|hook| show(hook).lines().filter(|l| l.contains("up_")).count()).iter().sum()
    }
}

pub async fn listen(namespace: &str, address: &str) -> TcpListener {
    let address = SocketAddr::new(address.parse().unwrap(), PORT);
    inside(namespace, move || {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        io::Result::Ok(listener)
    })
    .await
    .unwrap()
}

pub async fn inside<T: Send + 'static>(namespace: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    let netns = Netns::open(format!("/run/netns/{namespace}").as_ref()).unwrap();
    netns.run(f).await
}

/// Accepts what was captured, and says where it wanted to go.
pub async fn accept(capture: &Capture, pod: &Pod, listeners: &PodListeners, v4: bool) -> Option<SocketAddr> {
    let accepts = listeners
        .outbound
        .iter()
        .filter(|l| l.local_addr().unwrap().is_ipv4() == v4)
        .map(|l| Box::pin(async { (l.accept().await.unwrap(), l.local_addr().unwrap().port()) }));
    let (((stream, client), port), ..) =
        timeout(*SOON, futures_util::future::select_all(accepts)).await.expect("nothing was captured");
    let listener = stream.local_addr().unwrap();
    assert_eq!(listener.port(), port);
    assert!(listener.ip().is_loopback());
    let original = capture.take_original_destination(pod, client, listener);
    assert_eq!(capture.take_original_destination(pod, client, listener), None, "an entry is used once");
    original
}
