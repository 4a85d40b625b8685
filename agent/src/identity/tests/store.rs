use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{Notify, Semaphore},
    task::JoinHandle,
    time::timeout,
};

use super::{LIMIT, domain, identity, set};
use crate::{
    identity::{CertificateStore, IssueError, Issuer, LocalIssuer, Svid},
    mesh::SpiffeId,
};

/// The local CA, with faults, and a record of what was asked of it.
struct Faulty {
    ca: LocalIssuer,
    _directory: tempfile::TempDir,
    failing: AtomicBool,
    asked: Mutex<BTreeMap<SpiffeId, usize>>,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    changed: Notify,
    /// Order of the questions.
    order: Mutex<Vec<SpiffeId>>,
    /// Permits for answers, where they are limited.
    gate: Option<Semaphore>,
}

impl Faulty {
    fn new(lifetime: Duration) -> Arc<Self> {
        Self::gated(lifetime, None)
    }

    fn gated(lifetime: Duration, gate: Option<Semaphore>) -> Arc<Self> {
        let directory = tempfile::tempdir().unwrap();
        Arc::new(Self {
            ca: LocalIssuer::open(&directory.path().join("ca"), &domain(), lifetime).unwrap(),
            _directory: directory,
            failing: AtomicBool::new(false),
            asked: Mutex::default(),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
            changed: Notify::new(),
            order: Mutex::default(),
            gate,
        })
    }

    fn asked(&self, name: &str) -> usize {
        self.asked.lock().unwrap().get(&identity(name)).copied().unwrap_or_default()
    }
}

impl Issuer for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn issue<'a>(&'a self, identity: &'a SpiffeId) -> BoxFuture<'a, Result<Svid, IssueError>> {
        *self.asked.lock().unwrap().entry(identity.clone()).or_default() += 1;
        self.order.lock().unwrap().push(identity.clone());
        Box::pin(async move {
            if let Some(gate) = &self.gate {
                gate.acquire().await.unwrap().forget();
            }
            let now = self.at_once.fetch_add(1, SeqCst) + 1;
            self.most_at_once.fetch_max(now, SeqCst);
            let outcome = if self.failing.load(SeqCst) {
                Err(IssueError::Signing { identity: identity.clone(), reason: "told to fail".into() })
            } else {
                self.ca.issue(identity).await
            };
            self.at_once.fetch_sub(1, SeqCst);
            assert_ne!(identity.service_account(), "panics");
            outcome
        })
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.changed.notified())
    }
}

struct Running {
    issuer: Arc<Faulty>,
    store: Arc<CertificateStore>,
    run: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.run.abort();
    }
}

fn running(lifetime: Duration) -> Running {
    let issuer = Faulty::new(lifetime);
    let store = CertificateStore::new(Arc::clone(&issuer) as _);
    Running { run: tokio::spawn(Arc::clone(&store).run()), issuer, store }
}

const HOUR: Duration = Duration::from_hours(1);

#[tokio::test]
async fn keeps_what_is_wanted() {
    let r = running(HOUR);
    assert!(r.store.current(&identity("web")).is_none());
    r.store.want(set(&["web", "db"]));
    let web = r.store.wait_for(&identity("web"), LIMIT).await.expect("a certificate");
    assert_eq!(web.identity, identity("web"));
    assert!(r.store.wait_for(&identity("db"), LIMIT).await.is_some());

    let before = *r.store.subscribe().borrow();
    r.store.want(set(&["web", "cache"]));
    assert!(r.store.current(&identity("db")).is_none(), "dropped at once");
    assert!(*r.store.subscribe().borrow() > before);
    assert!(r.store.wait_for(&identity("cache"), LIMIT).await.is_some());
    assert!(Arc::ptr_eq(&web, &r.store.current(&identity("web")).unwrap()), "kept as it is");
    assert_eq!((r.issuer.asked("web"), r.issuer.asked("db")), (1, 1));
    assert!(r.store.wait_for(&identity("db"), Duration::from_millis(50)).await.is_none());
}

#[tokio::test]
async fn many_are_issued_a_few_at_a_time() {
    let r = running(HOUR);
    let names: Vec<String> = (0..60).map(|n| format!("w{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    r.store.want(set(&names));
    for name in names {
        assert!(r.store.wait_for(&identity(name), LIMIT).await.is_some());
        assert_eq!(r.issuer.asked(name), 1);
    }
    let most = r.issuer.most_at_once.load(SeqCst);
    assert!((1..=8).contains(&most), "{most} at once");
}

#[tokio::test]
async fn renews_at_half_life() {
    let r = running(Duration::from_secs(2));
    r.store.want(set(&["web"]));
    let mut svid = r.store.wait_for(&identity("web"), LIMIT).await.unwrap();
    let mut changes = r.store.subscribe();
    for _ in 0..3 {
        timeout(LIMIT, changes.changed()).await.unwrap().unwrap();
        let renewed = r.store.current(&identity("web")).expect("never without");
        assert_ne!(renewed.serial, svid.serial);
        assert!(svid.valid_at(SystemTime::now()), "before the old one expired");
        svid = renewed;
    }
}

#[tokio::test]
async fn a_failed_renewal_keeps_the_old_one_until_it_expires() {
    let r = running(Duration::from_secs(3));
    r.store.want(set(&["web"]));
    let svid = r.store.wait_for(&identity("web"), LIMIT).await.unwrap();
    r.issuer.failing.store(true, SeqCst);
    r.issuer.changed.notify_one();
    while let Ok(left) = svid.not_after.duration_since(SystemTime::now()) {
        let current = r.store.current(&identity("web"));
        assert!(current.is_some_and(|c| Arc::ptr_eq(&c, &svid)) || svid.not_after <= SystemTime::now());
        tokio::time::sleep(left.min(Duration::from_millis(50))).await;
    }
    assert!(r.store.current(&identity("web")).is_none(), "expired");
    let asked = r.issuer.asked("web");
    // 0.15 s, then 0.3 s again and again, for at most 3 s.
    assert!((2..=14).contains(&asked), "asked {asked} times");
    r.issuer.failing.store(false, SeqCst);
    assert!(r.store.wait_for(&identity("web"), LIMIT).await.is_some(), "recovers by itself");
}

#[tokio::test]
async fn changed_material_is_issued_again() {
    let r = running(HOUR);
    r.store.want(set(&["web", "db"]));
    let old = r.store.wait_for(&identity("web"), LIMIT).await.unwrap();
    r.store.wait_for(&identity("db"), LIMIT).await.unwrap();
    let mut changes = r.store.subscribe();
    r.issuer.changed.notify_one();
    while r.store.current(&identity("web")).unwrap().serial == old.serial {
        timeout(LIMIT, changes.changed()).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn an_issuer_that_panics_does_not_stop_the_others() {
    let r = running(HOUR);
    r.store.want(set(&["panics", "web"]));
    assert!(r.store.wait_for(&identity("web"), LIMIT).await.is_some());
    r.store.want(set(&["panics", "web", "db"]));
    assert!(r.store.wait_for(&identity("db"), LIMIT).await.is_some());
    assert!(r.store.current(&identity("panics")).is_none());
}

#[tokio::test]
async fn wanted_before_it_runs() {
    let issuer = Faulty::new(HOUR);
    let store = CertificateStore::new(issuer as _);
    store.want(BTreeSet::from([identity("web")]));
    let run = tokio::spawn(Arc::clone(&store).run());
    assert!(store.wait_for(&identity("web"), LIMIT).await.is_some());
    run.abort();
}

#[tokio::test]
async fn who_is_waited_for_comes_first() {
    let issuer = Faulty::gated(HOUR, Some(Semaphore::new(0)));
    let store = CertificateStore::new(Arc::clone(&issuer) as _);
    let asked = async |count: usize| {
        let all = async {
            while issuer.order.lock().unwrap().len() < count {
                tokio::task::yield_now().await;
            }
        };
        timeout(LIMIT, all).await.expect("the issuer is asked");
    };
    let names: Vec<String> = (0..40).map(|n| format!("w{n:02}")).collect();
    store.want(names.iter().map(|n| identity(n)).collect());
    let run = tokio::spawn(Arc::clone(&store).run());
    asked(6).await;

    // Last in the alphabet, and the issuer answers nobody: the places kept free are for them.
    let wait = |name: &'static str| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.wait_for(&identity(name), LIMIT).await })
    };
    let first = wait("w39");
    asked(7).await;
    let second = wait("w38");
    asked(8).await;
    let order: Vec<_> = issuer.order.lock().unwrap().iter().map(|id| id.service_account().to_owned()).collect();
    assert_eq!(order, ["w00", "w01", "w02", "w03", "w04", "w05", "w39", "w38"]);

    // With every place taken, who waits is still next.
    let third = wait("w37");
    let given_up = wait("w36");
    while store.waiting.in_order().len() < 4 {
        tokio::task::yield_now().await;
    }
    given_up.abort();
    assert!(given_up.await.is_err_and(|e| e.is_cancelled()));
    assert_eq!(store.waiting.in_order().len(), 3, "a connection that is gone waits no more");
    issuer.gate.as_ref().unwrap().add_permits(1);
    asked(9).await;
    assert_eq!(issuer.order.lock().unwrap()[8], identity("w37"));

    issuer.gate.as_ref().unwrap().add_permits(1000);
    for waiting in [first, second, third] {
        assert!(waiting.await.unwrap().is_some());
    }
    assert!(store.waiting.in_order().is_empty());
    run.abort();
}
