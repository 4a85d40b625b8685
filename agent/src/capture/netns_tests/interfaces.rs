//! Tests of listing and watching interfaces, on real ones.

use netlink_sys::AsyncSocket;
use tokio::time::timeout;

use super::*;
use crate::capture::netns::tests::{PATIENCE, TestNamespace};

async fn next(watch: &mut Watch) -> Change {
    timeout(*PATIENCE, watch.next()).await.expect("a change").expect("a live subscription")
}

fn named(interfaces: &[Interface], name: &str) -> Interface {
    interfaces
        .iter()
        .find(|interface| interface.name == name)
        .unwrap_or_else(|| panic!("{name}: {interfaces:?}"))
        .clone()
}

#[tokio::test]
async fn lists_everything_but_loopback_and_knows_who_has_a_header() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    assert_eq!(list(&netns).await.expect("list"), []);
    namespace.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
    namespace.ip(&["link", "set", "v0", "up"]);
    namespace.ip(&["tuntap", "add", "dev", "tun0", "mode", "tun"]);
    namespace.ip(&["tuntap", "add", "dev", "tap0", "mode", "tap"]);
    namespace.ip(&["link", "add", "mac0", "link", "v0", "type", "macvlan"]);
    let listed = list(&netns).await.expect("list");
    assert_eq!(listed.len(), 5, "{listed:?}");
    for (name, link_header) in [("v0", true), ("v1", true), ("tap0", true), ("mac0", true), ("tun0", false)] {
        assert_eq!(named(&listed, name).link_header, link_header, "{name}");
    }
}

#[tokio::test]
async fn watching_sees_interfaces_come_change_and_go() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    namespace.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
    let mut watch = watch(&netns).await.expect("watch");
    let first = [next(&mut watch).await, next(&mut watch).await];
    let v0 = named(&list(&netns).await.expect("list"), "v0");
    assert!(first.contains(&Change::New(v0.clone())), "{first:?}");

    namespace.ip(&["tuntap", "add", "dev", "tun0", "mode", "tun"]);
    let Change::New(tun) = next(&mut watch).await else { panic!("tun0 is new") };
    assert_eq!((tun.name.as_str(), tun.link_header), ("tun0", false));

    namespace.ip(&["link", "set", "v0", "name", "w0"]);
    assert_eq!(next(&mut watch).await, Change::New(Interface { name: "w0".to_owned(), ..v0.clone() }));

    // Leaving a bridge is announced as RTM_DELLINK of another family; the interface is still there.
    namespace.ip(&["link", "add", "br0", "type", "bridge"]);
    let Change::New(bridge) = next(&mut watch).await else { panic!("br0 is new") };
    namespace.ip(&["link", "set", "w0", "master", "br0"]);
    namespace.ip(&["link", "set", "w0", "up"]);
    namespace.ip(&["link", "set", "w0", "nomaster"]);
    namespace.ip(&["link", "del", "br0"]);
    assert_eq!(next(&mut watch).await, Change::Gone(bridge.index));

    namespace.ip(&["link", "del", "w0"]);
    let gone = [next(&mut watch).await, next(&mut watch).await];
    assert!(gone.contains(&Change::Gone(v0.index)), "{gone:?}");
}

#[tokio::test]
async fn lost_notifications_are_made_up_for() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    namespace.ip(&["link", "add", "old0", "type", "veth", "peer", "name", "old1"]);
    let mut watch = watch(&netns).await.expect("watch");
    let old = named(&list(&netns).await.expect("list"), "old0");
    next(&mut watch).await;
    next(&mut watch).await;

    // As small as the kernel allows: the burst below does not fit.
    watch.socket.socket_ref().set_rx_buf_sz(1u32).expect("receive buffer");
    namespace.ip(&["link", "del", "old0"]);
    for number in 0..20 {
        namespace.ip(&["link", "add", &format!("a{number}"), "type", "veth", "peer", "name", &format!("b{number}")]);
    }
    let expected = list(&netns).await.expect("list");
    assert_eq!(expected.len(), 40);
    while !watch.resync {
        timeout(*PATIENCE, watch.advance()).await.expect("an overrun").expect("a live subscription");
    }
    watch.pending.clear();
    let (mut seen, mut old_gone) = (BTreeMap::new(), false);
    while seen.len() < expected.len() {
        match next(&mut watch).await {
            Change::New(interface) => drop(seen.insert(interface.index, interface)),
            Change::Gone(index) => old_gone |= index == old.index,
        }
    }
    assert!(old_gone);
    for interface in expected {
        assert_eq!(seen.get(&interface.index), Some(&interface));
    }
}

#[test]
fn repeated_and_unknown_notifications_are_no_changes() {
    let mut known = BTreeMap::new();
    let mut pending = VecDeque::new();
    let interface = Interface { index: 7, name: "x".to_owned(), link_header: true, kind: None, other: None };
    apply(&mut known, &mut pending, Link::Present(interface.clone()));
    apply(&mut known, &mut pending, Link::Present(interface.clone()));
    // The other end of a pair goes first.
    let paired = Interface { other: Some(Other { index: 9, namespace: Some(0) }), ..interface.clone() };
    apply(&mut known, &mut pending, Link::Present(paired.clone()));
    apply(&mut known, &mut pending, Link::Present(interface.clone()));
    apply(&mut known, &mut pending, Link::Absent(8));
    apply(&mut known, &mut pending, Link::Absent(7));
    assert_eq!(pending, [Change::New(interface), Change::New(paired), Change::Gone(7)]);
}
