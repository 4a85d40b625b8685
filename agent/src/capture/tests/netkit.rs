//! Pods behind netkit pairs (Linux 6.7), in both modes: capture, both guards and plaintext that is
//! handed to the agent.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{InfoData, InfoKind, InfoNetkit, LinkAttribute, LinkInfo, LinkMessage, NetkitMode},
};
use tokio::time::timeout;
use underpass_abi::PLAINTEXT_PORT;

use super::{
    super::{Capture, TcMode, netns::netlink::Channel},
    lab::{Connected, Lab, ip, snapshot, tool},
    scene::{PORT, SOON},
    workload,
};
use crate::{
    mesh::MeshSettings,
    policy::{Disposition, PlaintextRules},
    sys::bpf::{Hook, links_on},
};

/// A pair whose primary end is on the node, which is the namespace of the tests.
struct Pair {
    lab: Lab,
    pod: String,
    device: String,
    inside: String,
    /// Listens on the node, and is in the mesh.
    listener: TcpListener,
}

impl Pair {
    fn new(mode: NetkitMode, number: u8) -> Self {
        let lab = Lab::new();
        let pod = lab.namespace("kit");
        let device = format!("k{number}{}", pod.trim_start_matches("up").trim_end_matches("-kit"));
        make(&device, mode).expect("netkit");
        // The kernel has named the other end.
        let shown = ip(&format!("-o link show {device}"));
        let other =
            shown.split_whitespace().nth(1).unwrap().trim_end_matches(':').split('@').nth(1).unwrap().to_owned();
        ip(&format!("link set {other} netns {pod} name eth0"));
        let (inside, outside) = (format!("10.99.{number}.1"), format!("10.99.{number}.2"));
        ip(&format!("-n {pod} addr add {inside}/24 dev eth0"));
        ip(&format!("-n {pod} link set eth0 up"));
        ip(&format!("addr add {outside}/24 dev {device}"));
        ip(&format!("link set {device} up"));
        let listener = TcpListener::bind((outside.as_str(), PORT)).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { lab, pod, device, inside, listener }
    }

    fn outside(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    async fn dial(&self) -> Connected {
        self.lab.connects(&self.pod, false, &self.outside().ip().to_string(), PORT).await
    }

    fn arrived(&self) -> usize {
        std::iter::from_fn(|| self.listener.accept().ok()).count()
    }
}

/// Makes a pair in the namespace of the calling thread; iproute2 knows no netkit where the tests
/// run.
fn make(name: &str, mode: NetkitMode) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let data = InfoData::Netkit(vec![InfoNetkit::Mode(mode)]);
    link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Netkit), LinkInfo::Data(data)]));
    Channel::open(NETLINK_ROUTE)?.change(RouteNetlinkMessage::NewLink(link), NLM_F_CREATE | NLM_F_EXCL)
}

async fn guarded(mode: NetkitMode, number: u8, tc: TcMode) {
    let pair = Pair::new(mode, number);
    let capture = pair.lab.start_with(tc).await;
    let web = workload("web", &pair.inside, Some(&format!("/run/netns/{}", pair.pod)));
    let node = workload("node", &pair.outside().ip().to_string(), None);
    capture.apply(&snapshot(MeshSettings::default(), vec![web.clone(), node])).unwrap();
    assert_eq!((pair.dial().await, pair.arrived()), (Connected::Yes, 1), "the control");

    let pod = capture.enroll(&web, None).await.unwrap();
    let guards = capture.interfaces(pod.id);
    assert_eq!(guards.len(), 1, "{guards:?}");
    assert_eq!((guards[0].kind.as_str(), guards[0].node_guard.as_deref()), ("netkit", Some(pair.device.as_str())));
    if tc != TcMode::Clsact {
        let index = nix::net::if_::if_nametoindex(pair.device.as_str()).unwrap();
        assert_eq!(
            links_on(index, Hook::NetkitPeer).unwrap().len(),
            1,
            "before whatever else a network plugin has there"
        );
    }
    assert_eq!((pair.dial().await, pair.arrived()), (Connected::TimedOut, 0));

    // The agent's own sockets are known on the node's side too, whatever port they go to.
    let own = pod.upstream_socket(pair.outside().ip()).await.unwrap();
    own.set_nonblocking(false).unwrap();
    let to = pair.outside();
    tokio::task::spawn_blocking(move || own.connect_timeout(&to.into(), *SOON)).await.unwrap().unwrap();
    assert_eq!(pair.arrived(), 1);

    // With the guard inside the pod gone, the node's side holds alone.
    for (name, path) in pins(&pair) {
        if name.ends_with("-egress") {
            std::fs::remove_file(path).unwrap();
        }
    }
    if tc == TcMode::Clsact {
        tool("tc", &format!("-n {} qdisc del dev eth0 clsact", pair.pod));
    }
    let before = capture.counters()["guard_dropped"];
    assert_eq!((pair.dial().await, pair.arrived()), (Connected::TimedOut, 0), "from the node's side alone");
    assert!(capture.counters()["guard_dropped"] > before);
    capture.unenroll(&web.key).await;
    assert_eq!((pair.dial().await, pair.arrived()), (Connected::Yes, 1), "plain traffic again");
}

fn pins(pair: &Pair) -> Vec<(String, std::path::PathBuf)> {
    let pins = pair.lab.layout().tc_pins().unwrap();
    pins.into_iter().map(|(pin, path)| (pin.to_string(), path)).collect()
}

/// Plaintext that a policy has to see is assigned to the agent's listener at ingress of the pod's
/// end.
async fn assigned(mode: NetkitMode, number: u8) {
    let pair = Pair::new(mode, number);
    let capture: std::sync::Arc<Capture> = pair.lab.start().await;
    let web = workload("web", &pair.inside, Some(&format!("/run/netns/{}", pair.pod)));
    capture.apply(&snapshot(MeshSettings::default(), vec![web.clone()])).unwrap();
    let rules = PlaintextRules { default: Disposition::Evaluate, ports: std::collections::BTreeMap::new() };
    let pod = capture.enroll(&web, Some(rules)).await.unwrap();
    let listeners = pod.take_listeners().unwrap();
    let to: SocketAddr = format!("{}:{PORT}", pair.inside).parse().unwrap();
    let client = tokio::task::spawn_blocking(move || TcpStream::connect_timeout(&to, *SOON));
    let accepts = listeners.plaintext.iter().map(|listener| Box::pin(listener.accept()));
    let accepted = timeout(*SOON, futures_util::future::select_all(accepts)).await;
    let counters = capture.counters();
    let Ok((accepted, ..)) = accepted else { panic!("nothing on port {PLAINTEXT_PORT}: {counters:?}") };
    let (stream, _) = accepted.unwrap();
    assert_eq!(stream.local_addr().unwrap(), to, "the agent sees where the client wanted to go");
    client.await.unwrap().unwrap();
    assert_eq!((counters["inbound_assigned"], counters["inbound_assign_failed"]), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs netkit: cargo xtask vm"]
async fn pods_are_guarded_in_l2_mode() {
    guarded(NetkitMode::L2, 1, TcMode::Auto).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs netkit: cargo xtask vm"]
async fn pods_are_guarded_in_l3_mode() {
    guarded(NetkitMode::L3, 2, TcMode::Auto).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs netkit: cargo xtask vm"]
async fn pods_are_guarded_with_clsact() {
    guarded(NetkitMode::L2, 3, TcMode::Clsact).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs netkit: cargo xtask vm"]
async fn plaintext_is_assigned_in_l2_mode() {
    assigned(NetkitMode::L2, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs netkit: cargo xtask vm"]
async fn plaintext_is_assigned_in_l3_mode() {
    assigned(NetkitMode::L3, 5).await;
}
