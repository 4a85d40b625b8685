//! Tests of the socket pool.

use std::{collections::HashSet, os::fd::AsFd, sync::atomic::AtomicBool};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::Domain;

use super::*;
use crate::{
    capture::{
        netns::tests::{PATIENCE, TestNamespace, counting_mark},
        sockets,
    },
    sys::net::netns_cookie,
};

fn pool(namespace: &TestNamespace) -> Arc<Pool> {
    let (mark, _) = counting_mark();
    Pool::new((*namespace.open()).clone(), move || sockets::upstream(Domain::IPV4, &*mark))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_at_once_get_a_socket_each() {
    // All are held at once.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("limit");
    let namespace = TestNamespace::new();
    let pool = pool(&namespace);
    let started = Instant::now();
    let takers: Vec<_> = (0..2000)
        .map(|_| {
            let pool = Arc::clone(&pool);
            tokio::spawn(async move { pool.take().await })
        })
        .collect();
    let mut sockets = Vec::new();
    for taker in takers {
        sockets
            .push(tokio::time::timeout(*PATIENCE, taker).await.expect("in time").expect("no panic").expect("a socket"));
    }
    println!("2000 sockets in {:?}", started.elapsed());
    let cookies: HashSet<_> = sockets.iter().map(|socket| socket.cookie().expect("cookie")).collect();
    assert_eq!(cookies.len(), 2000);
    for socket in &sockets {
        assert_eq!(netns_cookie(socket.as_fd()).expect("cookie"), pool.netns.cookie());
    }
    assert_eq!(pool.batch.load(Ordering::Relaxed), LARGEST);
    assert!(pool.ready().len() <= LARGEST);
}

#[tokio::test]
async fn an_unused_pool_shrinks_and_a_used_one_does_not() {
    let namespace = TestNamespace::new();
    let pool = pool(&namespace);
    assert_eq!(pool.ready().len(), 0, "nothing before the first use");
    let mut held = Vec::new();
    for _ in 0..200 {
        held.push(pool.take().await.expect("socket"));
    }
    // The turn at the lock means that no refill is under way.
    drop(pool.refill.lock().await);
    pool.fill(LARGEST).expect("fill from here: only the number matters");
    assert_eq!(pool.ready().len(), LARGEST);
    for _ in 0..4 {
        pool.sweep();
        pool.take().await.expect("socket");
    }
    drop(pool.refill.lock().await);
    assert!(pool.ready().len() > KEEP && pool.batch.load(Ordering::Relaxed) > SMALLEST);
    pool.sweep();
    assert!(pool.ready().len() > KEEP, "one look is not enough");
    pool.sweep();
    assert_eq!((pool.ready().len(), pool.batch.load(Ordering::Relaxed)), (KEEP, SMALLEST));
    pool.take().await.expect("socket");
}

#[tokio::test]
async fn batches_follow_the_pace() {
    let namespace = TestNamespace::new();
    let pool = pool(&namespace);
    let ago = |time| Some(Instant::now().checked_sub(time).expect("a machine that is up for a minute"));
    assert_eq!(pool.next_batch(&mut None), SMALLEST);
    let sizes: Vec<_> = (0..6).map(|_| pool.next_batch(&mut ago(SOON / 2))).collect();
    assert_eq!(sizes, [8, 16, 32, 64, 64, 64]);
    assert_eq!(pool.next_batch(&mut ago(SOON * 2)), 64);
    let sizes: Vec<_> = (0..5).map(|_| pool.next_batch(&mut ago(LATE * 2))).collect();
    assert_eq!(sizes, [32, 16, 8, 4, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_reaches_everyone_who_waits_and_passes() {
    let namespace = TestNamespace::new();
    let broken = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&broken);
    let pool = Pool::new((*namespace.open()).clone(), move || {
        if switch.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Socket::new(Domain::IPV4, socket2::Type::STREAM, None)
    });
    let takers: Vec<_> = (0..50)
        .map(|_| {
            let pool = Arc::clone(&pool);
            tokio::spawn(async move { pool.take().await })
        })
        .collect();
    for taker in takers {
        let taken = tokio::time::timeout(*PATIENCE, taker).await.expect("in time").expect("no panic");
        assert_eq!(taken.expect_err("no descriptors").raw_os_error(), Some(libc::EMFILE));
    }
    broken.store(false, Ordering::Relaxed);
    tokio::time::timeout(*PATIENCE, pool.take()).await.expect("in time").expect("a socket");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn takers_that_give_up_lose_nothing_and_block_nobody() {
    let namespace = TestNamespace::new();
    let pool = pool(&namespace);
    for _ in 0..100 {
        let taker = Arc::clone(&pool);
        let task = tokio::spawn(async move { taker.take().await });
        tokio::task::yield_now().await;
        task.abort();
    }
    tokio::time::timeout(*PATIENCE, pool.take()).await.expect("in time").expect("a socket");
}
