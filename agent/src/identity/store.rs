//! Keeps a valid certificate for every local identity.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use futures_util::FutureExt as _;
use tokio::{
    sync::watch,
    task::{Id, JoinSet, spawn_blocking},
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{IssueError, Issuer, Recalled, Svid, schedule::Slot, waiting::Waiting};
use crate::mesh::SpiffeId;

/// Certificates issued at the same time.
const MAX_ISSUING: usize = 8;
/// Of these, kept free for identities that a connection waits for: a slow issuer must not make it wait for renewals.
const RESERVED: usize = 2;
/// One attempt may take this long.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after the start what an earlier agent kept may belong to a pod that is not known yet.
const LEFTOVERS: Duration = Duration::from_mins(10);
/// Longest sleep: due times are wall-clock times, and the wall clock may be set or the machine suspended.
const MAX_SLEEP: Duration = Duration::from_mins(1);

/// Current certificates by identity. Renewed at half-life with jitter; a failed renewal keeps the old one while it is
/// valid and is retried with backoff.
pub struct CertificateStore {
    issuer: Arc<dyn Issuer>,
    wanted: watch::Sender<BTreeSet<SpiffeId>>,
    current: ArcSwap<HashMap<SpiffeId, Arc<Svid>>>,
    /// Held while `wanted` or `current` change, so that no certificate appears for an identity that is dropped meanwhile.
    writing: Mutex<()>,
    version: watch::Sender<u64>,
    pub(super) waiting: Waiting,
}

impl CertificateStore {
    /// A store fed by `issuer`.
    pub fn new(issuer: Arc<dyn Issuer>) -> Arc<Self> {
        Arc::new(Self {
            issuer,
            wanted: watch::Sender::default(),
            current: ArcSwap::default(),
            writing: Mutex::default(),
            version: watch::Sender::default(),
            waiting: Waiting::default(),
        })
    }

    /// Sets which identities are kept; new ones are issued at once, others dropped.
    pub fn want(&self, identities: BTreeSet<SpiffeId>) {
        let _guard = self.write();
        if self.current.load().keys().any(|id| !identities.contains(id)) {
            let mut kept = HashMap::clone(&self.current.load());
            kept.retain(|id, _| identities.contains(id));
            self.replace(kept);
        }
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != identities;
            *wanted = identities;
            changed
        });
    }

    /// Name of where certificates come from.
    pub fn source(&self) -> &'static str {
        self.issuer.name()
    }

    /// What has to be there before anything can be issued, and is not.
    pub fn lacks(&self) -> Option<String> {
        self.issuer.lacks()
    }

    /// The current certificate, if there is one that is valid now.
    pub fn current(&self, identity: &SpiffeId) -> Option<Arc<Svid>> {
        self.current.load().get(identity).filter(|s| s.valid_at(SystemTime::now())).cloned()
    }

    /// The identities that are kept.
    pub fn wanted(&self) -> BTreeSet<SpiffeId> {
        self.wanted.borrow().clone()
    }

    /// The latest certificate of every identity that has one, valid or not.
    pub fn all(&self) -> Arc<HashMap<SpiffeId, Arc<Svid>>> {
        self.current.load_full()
    }

    /// Waits until `identity` has a certificate, at most `limit`. Meanwhile it is before all others that nobody waits for.
    pub async fn wait_for(&self, identity: &SpiffeId, limit: Duration) -> Option<Arc<Svid>> {
        let mut changes = self.subscribe();
        if let Some(svid) = self.current(identity) {
            return Some(svid);
        }
        let _place = self.waiting.enter(identity);
        timeout(limit, async {
            loop {
                if let Some(svid) = self.current(identity) {
                    return Some(svid);
                }
                changes.changed().await.ok()?;
            }
        })
        .await
        .ok()?
    }

    /// Counts up whenever any certificate changed.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Issues and renews until cancelled (dropped).
    pub async fn run(self: Arc<Self>) {
        let mut wanted = self.wanted.subscribe();
        wanted.mark_changed();
        let mut changed = self.issuer.changed();
        let mut slots: BTreeMap<SpiffeId, Slot> = BTreeMap::new();
        let mut issuing: JoinSet<Result<Svid, IssueError>> = JoinSet::new();
        let mut tasks: HashMap<Id, SpiffeId> = HashMap::new();
        let mut leftovers = pin!(sleep(LEFTOVERS).fuse());
        loop {
            let pause = self.start_due(&mut slots, &mut issuing, &mut tasks);
            tokio::select! {
                _ = wanted.changed() => {
                    let wanted = wanted.borrow_and_update().clone();
                    self.change_slots(&mut slots, wanted).await;
                }
                () = &mut leftovers => {
                    let (issuer, wanted) = (Arc::clone(&self.issuer), self.wanted());
                    // What is not removed now is when the next agent starts.
                    drop(spawn_blocking(move || issuer.forget_others(&wanted)));
                }
                () = &mut changed => {
                    debug!(issuer = self.issuer.name(), "material changed, every certificate is issued again");
                    changed = self.issuer.changed();
                    slots.values_mut().for_each(Slot::at_once);
                }
                Some(done) = issuing.join_next_with_id() => {
                    let (task, outcome) = match done {
                        Ok((task, outcome)) => (task, Some(outcome)),
                        Err(panicked) => (panicked.id(), None),
                    };
                    let Some(id) = tasks.remove(&task) else { continue };
                    match slots.get_mut(&id) {
                        Some(slot) => self.finish(&id, slot, outcome),
                        // It came too late, and may have been kept.
                        None => self.forget([id].into()),
                    }
                }
                () = self.waiting.entered.notified() => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// Makes the slots those of `wanted`. New identities begin with what an earlier agent kept of them.
    async fn change_slots(&self, slots: &mut BTreeMap<SpiffeId, Slot>, wanted: BTreeSet<SpiffeId>) {
        let dropped: BTreeSet<_> = slots.keys().filter(|id| !wanted.contains(id)).cloned().collect();
        slots.retain(|id, _| !dropped.contains(id));
        let new: Vec<_> = wanted.into_iter().filter(|id| !slots.contains_key(id)).collect();
        if new.is_empty() && dropped.is_empty() {
            return;
        }
        let issuer = Arc::clone(&self.issuer);
        let recall = move || -> Vec<_> {
            for id in &dropped {
                issuer.forget(id);
            }
            new.into_iter().map(|id| (issuer.recall(&id), id)).collect()
        };
        let recalled = spawn_blocking(recall).await.unwrap_or_default();
        let (now, mut used) = (SystemTime::now(), 0);
        for (recalled, id) in recalled {
            let mut slot = Slot::default();
            if let Some(Recalled { svid, current }) = recalled.filter(|r| r.svid.identity == id) {
                if current {
                    slot.issued(&svid, now);
                }
                self.put(svid);
                used += 1;
            }
            slots.insert(id, slot);
        }
        if used > 0 {
            info!(certificates = used, "certificates that an earlier agent kept are used until they are renewed");
        }
    }

    /// Nothing is kept of these for the next agent.
    fn forget(&self, identities: BTreeSet<SpiffeId>) {
        let issuer = Arc::clone(&self.issuer);
        drop(spawn_blocking(move || identities.iter().for_each(|id| issuer.forget(id))));
    }

    /// Starts what is due and returns how long nothing else will be.
    fn start_due(
        &self,
        slots: &mut BTreeMap<SpiffeId, Slot>,
        issuing: &mut JoinSet<Result<Svid, IssueError>>,
        tasks: &mut HashMap<Id, SpiffeId>,
    ) -> Duration {
        let now = SystemTime::now();
        let mut free = MAX_ISSUING.saturating_sub(issuing.len());
        let mut start = |id: &SpiffeId, slot: &mut Slot| {
            slot.start();
            let (issuer, identity) = (Arc::clone(&self.issuer), id.clone());
            let task = issuing.spawn(async move {
                timeout(ISSUE_TIMEOUT, issuer.issue(&identity)).await.unwrap_or_else(|_| {
                    Err(IssueError::Signing { identity: identity.clone(), reason: "no answer within 10 s".into() })
                })
            });
            tasks.insert(task.id(), id.clone());
        };
        for id in self.waiting.in_order() {
            if free > 0
                && let Some(slot) = slots.get_mut(&id)
                && slot.wait(now).is_some_and(|wait| wait.is_zero())
            {
                start(&id, slot);
                free -= 1;
            }
        }
        let mut pause = MAX_SLEEP;
        for (id, slot) in slots {
            let Some(wait) = slot.wait(now) else { continue };
            if !wait.is_zero() {
                pause = pause.min(wait);
            } else if free > RESERVED {
                start(id, slot);
                free -= 1;
            }
        }
        pause
    }

    fn finish(&self, id: &SpiffeId, slot: &mut Slot, outcome: Option<Result<Svid, IssueError>>) {
        let now = SystemTime::now();
        let old = self.current.load().get(id).cloned();
        let outcome = outcome
            .unwrap_or_else(|| Err(IssueError::Signing { identity: id.clone(), reason: "the issuer panicked".into() }));
        match outcome {
            Ok(svid) if svid.valid_at(now) && svid.identity == *id => {
                slot.issued(&svid, now);
                let same = old.is_some_and(|o| {
                    o.serial == svid.serial && o.roots_id == svid.roots_id && o.certified.cert == svid.certified.cert
                });
                debug!(identity = %id, serial = svid.serial, renewed = !same, "certificate");
                if !same {
                    self.put(svid);
                }
            }
            Ok(svid) => {
                let retry = slot.failed(old.as_deref(), now);
                warn!(identity = %id, got = %svid.identity, ?retry, "issuer returned a certificate that is of somebody else or not valid now");
            }
            Err(error) => {
                let retry = slot.failed(old.as_deref(), now);
                let still_valid = old.as_ref().is_some_and(|o| o.valid_at(now));
                if old.is_some() && !still_valid {
                    self.forget([id.clone()].into());
                }
                warn!(identity = %id, issuer = self.issuer.name(), %error, ?retry, still_valid, "no new certificate");
            }
        }
    }

    fn put(&self, svid: Svid) {
        let _guard = self.write();
        if self.wanted.borrow().contains(&svid.identity) {
            let mut certificates = HashMap::clone(&self.current.load());
            certificates.insert(svid.identity.clone(), Arc::new(svid));
            self.replace(certificates);
        }
    }

    fn replace(&self, certificates: HashMap<SpiffeId, Arc<Svid>>) {
        self.current.store(Arc::new(certificates));
        self.version.send_modify(|v| *v += 1);
    }

    fn write(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
