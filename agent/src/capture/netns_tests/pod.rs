//! Tests of the pod as the proxy uses it.

use std::{net::SocketAddr, os::fd::AsFd, time::Duration};

use tokio::time::timeout;

use super::*;
use crate::{
    capture::netns::tests::{PATIENCE, TestNamespace, counting_mark},
    sys::net::netns_cookie,
};

async fn enrolled(namespace: &TestNamespace) -> Arc<Pod> {
    let netns = namespace.open();
    let (mark, _) = counting_mark();
    routes::install(&netns).await.expect("routes");
    let listeners = sockets::listen(&netns, &mark).await.expect("listeners");
    Pod::new(NewPod {
        id: 7,
        key: WorkloadKey { namespace: "shop".into(), name: "cart".into() },
        identity: "spiffe://cluster.local/ns/shop/sa/cart".parse().expect("identity"),
        netns,
        listeners,
        mark,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hands_out_sockets_of_the_right_kind() {
    let namespace = TestNamespace::new();
    let pod = enrolled(&namespace).await;
    for (address, v6) in [("192.0.2.7", false), ("::ffff:192.0.2.7", false), ("2001:db8::7", true)] {
        let address: IpAddr = address.parse().expect("address");
        let upstream = pod.upstream_socket(address).await.expect("upstream");
        let application = pod.application_socket(address).await.expect("application");
        for socket in [&upstream, &application] {
            assert_eq!(netns_cookie(socket.as_fd()).expect("cookie"), pod.netns_cookie);
            let expected = if v6 { Domain::IPV6 } else { Domain::IPV4 };
            assert_eq!(socket.domain().expect("domain"), expected, "{address}");
        }
        assert_eq!(upstream.mark().expect("mark"), 0);
        let bound = application.local_addr().expect("address").as_socket();
        assert_eq!(bound, Some(SocketAddr::new(address.to_canonical(), 0)));
    }
}

#[tokio::test]
async fn listeners_are_given_once_and_closed_when_nobody_took_them() {
    let namespace = TestNamespace::new();
    let pod = enrolled(&namespace).await;
    let listeners = pod.take_listeners().expect("the first time");
    assert_eq!(listeners.tunnel.len(), 2);
    assert!(pod.take_listeners().is_none());
    drop((listeners, pod));

    let pod = enrolled(&namespace).await;
    pod.signal_unenrolled();
    assert!(pod.take_listeners().is_none());
    // The ports are free again although the pod lives.
    let again = enrolled(&namespace).await;
    drop((pod, again));
}

#[tokio::test]
async fn unenrolling_wakes_all_who_wait_and_those_who_come_later() {
    let namespace = TestNamespace::new();
    let pod = enrolled(&namespace).await;
    assert!(timeout(Duration::from_millis(20), pod.unenrolled()).await.is_err());
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let pod = Arc::clone(&pod);
            tokio::spawn(async move { pod.unenrolled().await })
        })
        .collect();
    tokio::task::yield_now().await;
    pod.signal_unenrolled();
    for waiter in waiting {
        timeout(*PATIENCE, waiter).await.expect("in time").expect("no panic");
    }
    timeout(*PATIENCE, pod.unenrolled()).await.expect("already");
    // Live connections still get sockets.
    pod.application_socket([192, 0, 2, 7].into()).await.expect("socket");
}

#[tokio::test]
async fn the_last_reference_takes_the_reply_route_with_it() {
    let namespace = TestNamespace::new();
    let has_rule = || namespace.ip(&["rule", "show"]).contains("fwmark 0x539");
    let pod = enrolled(&namespace).await;
    let connection = Arc::clone(&pod);
    drop(pod);
    assert!(has_rule());
    drop(connection);
    // Removal is queued to a worker; nothing reports its end.
    timeout(*PATIENCE, async {
        while has_rule() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("removed");
}
