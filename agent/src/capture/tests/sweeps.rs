//! Forbidden plaintext connections end, whatever goes wrong first.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
};

use super::{
    super::{
        TcMode,
        netns::Netns,
        sockdiag,
        sweep::{Cause, Judge, Sweep, Sweeps},
    },
    lab::{POD, until},
    scene::{PORT, SOON, Scene, inside},
};
use crate::mesh::InboundMode;

/// A connection from the peer that the pod has accepted.
async fn admitted(scene: &Scene) -> (TcpStream, TcpStream) {
    let address: SocketAddr = format!("{POD}:{PORT}").parse().unwrap();
    let client = inside(&scene.net.peer, move || TcpStream::connect_timeout(&address, *SOON)).await.unwrap();
    let mut accepted = None;
    until("the connection is accepted", || {
        accepted = scene.listeners[2].accept().ok();
        accepted.is_some()
    })
    .await;
    (client, accepted.unwrap().0)
}

async fn ends(mut client: TcpStream) {
    let read = tokio::task::spawn_blocking(move || {
        client.set_read_timeout(Some(*SOON))?;
        client.read(&mut [0; 1])
    });
    assert_eq!(read.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

fn goes_on(client: &TcpStream) {
    client.set_nonblocking(true).unwrap();
    let read = (&mut &*client).read(&mut [0; 1]);
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    client.set_nonblocking(false).unwrap();
}

/// The maps say STRICT since an earlier agent, which ended before it had ended the connections.
#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_pod_is_swept_though_nothing_got_stricter() {
    let mut scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let pod = capture.enroll(&scene.web, None).await.unwrap();
    let (client, _server) = admitted(&scene).await;
    scene.web.mode = InboundMode::Strict;
    let mut entry = capture.inner.registry().entries[&pod.key].clone();
    entry.workload = scene.web.clone();
    assert!(capture.inner.capture(entry).unwrap(), "stricter, and nobody is told");
    goes_on(&client);
    drop((pod, capture));
    let capture = scene.start(TcMode::Auto).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    ends(client).await;
}

/// What came in while the pod was outside of the mesh is plaintext like any other.
#[tokio::test(flavor = "multi_thread")]
async fn a_strict_pod_that_joins_is_swept() {
    let mut scene = Scene::new().await;
    let (client, _server) = admitted(&scene).await;
    scene.web.mode = InboundMode::Strict;
    let capture = scene.start(TcMode::Auto).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    ends(client).await;
}

/// Ends connections after so many failures.
fn failing(failures: u32) -> (Arc<Sweeps>, Arc<AtomicU32>) {
    let attempts = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&attempts);
    let sweeps = Sweeps::ending_with(move |netns, forbidden| {
        let attempt = count.fetch_add(1, Relaxed) + 1;
        Box::pin(async move {
            if attempt <= failures {
                return Err(io::Error::other(format!("failure {attempt}")));
            }
            sockdiag::destroy_plaintext(&netns, forbidden).await
        })
    });
    (sweeps, attempts)
}

fn sweep(scene: &Scene, cause: Cause, judge: Judge) -> Sweep {
    let netns = Netns::open(scene.net.path().as_ref()).unwrap();
    Sweep { key: scene.web.key.clone(), netns, cause, judge }
}

fn everything() -> Judge {
    Arc::new(|| Some(Box::new(|_, _| true)))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_tried_until_it_succeeds() {
    let scene = Scene::new().await;
    let (client, _server) = admitted(&scene).await;
    let (sweeps, attempts) = failing(3);
    sweeps.run(sweep(&scene, Cause::Policy, everything())).await;
    let unswept = sweeps.unswept();
    assert_eq!(unswept.len(), 1);
    let known = (&unswept[0].key, unswept[0].cause, unswept[0].attempts, &*unswept[0].error);
    assert_eq!(known, (&scene.web.key, Cause::Policy, 1, "failure 1"));
    goes_on(&client);
    // Another cause is outstanding by itself; the same one again is not a second entry.
    sweeps.run(sweep(&scene, Cause::Policy, everything())).await;
    assert_eq!(sweeps.unswept().len(), 1);
    ends(client).await;
    until("nothing is outstanding", || sweeps.unswept().is_empty()).await;
    assert_eq!(attempts.load(Relaxed), 4);
}

/// A late attempt goes by what holds then.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_allowed_again_is_left_alone() {
    let scene = Scene::new().await;
    let (client, _server) = admitted(&scene).await;
    let (sweeps, attempts) = failing(1);
    let strict = Arc::new(AtomicBool::new(true));
    let now = Arc::clone(&strict);
    let judge: Judge = Arc::new(move || {
        let strict = now.load(Relaxed);
        Some(Box::new(move |_, _| strict))
    });
    sweeps.run(sweep(&scene, Cause::Mode, judge)).await;
    strict.store(false, Relaxed);
    until("nothing is outstanding", || sweeps.unswept().is_empty()).await;
    assert_eq!(attempts.load(Relaxed), 2);
    goes_on(&client);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_leaves_the_mesh_is_not_swept() {
    let scene = Scene::new().await;
    let (client, _server) = admitted(&scene).await;
    let (sweeps, attempts) = failing(1);
    let sweep = sweep(&scene, Cause::Mode, everything());
    let netns = sweep.netns.cookie();
    sweeps.run(sweep).await;
    sweeps.forget(netns);
    assert_eq!((sweeps.unswept(), attempts.load(Relaxed)), (vec![], 1));
    goes_on(&client);
}
