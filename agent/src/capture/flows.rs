//! Captured connections that the agent has not accepted yet, and whose they are.
//!
//! The programs make an entry and count it; whoever removes the entry takes it off the count, exactly once, because only one
//! removal succeeds. What could still make count and entries differ is an agent that is killed between the two, so the counts
//! are compared with the entries now and then.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use aya::{
    Ebpf,
    maps::{HashMap, Map, MapData},
};
use tokio::time::{MissedTickBehavior, interval};
use underpass_abi::{ALL_FLOWS, FlowKey, OriginalDestination, PendingFlows, capacity, flow_share};

use super::{
    CaptureError,
    desired::address,
    maps::{Maps, chain, failed, take},
};
use crate::sys::bpf::{SharedMap, SharedWords};

/// How often the counts are looked at. Connections wait for milliseconds, so a count that stands still for so long is either
/// wrong or that of connections which nobody accepts.
const LOOK: Duration = Duration::from_secs(30);

/// Words of a [`PendingFlows`].
const WORDS: usize = size_of::<PendingFlows>() / size_of::<u64>();

/// `FLOWS` and `PENDING_FLOWS`.
pub struct Flows {
    entries: SharedMap<FlowKey, OriginalDestination>,
    /// The same map, to go through.
    all: Mutex<HashMap<MapData, FlowKey, OriginalDestination>>,
    pending: SharedWords,
}

/// A pod's count as it was, to tell whether it has moved.
type Seen = BTreeMap<u32, PendingFlows>;

impl Flows {
    /// Takes the maps out of a loaded object.
    pub fn take(bpf: &mut Ebpf) -> Result<Self, CaptureError> {
        let wrong = |name, e: io::Error| failed(name, e.to_string());
        let Map::HashMap(flows) = take(bpf, "FLOWS")? else {
            return Err(failed("FLOWS", "not a hash map".to_owned()));
        };
        let Map::Array(pending) = take(bpf, "PENDING_FLOWS")? else {
            return Err(failed("PENDING_FLOWS", "not an array".to_owned()));
        };
        let fd = flows.fd().as_fd().try_clone_to_owned();
        Ok(Self {
            entries: fd.and_then(SharedMap::new).map_err(|e| wrong("FLOWS", e))?,
            all: Mutex::new(HashMap::try_from(Map::HashMap(flows)).map_err(|e| failed("FLOWS", chain(&e)))?),
            pending: SharedWords::map(pending.fd().as_fd(), WORDS).map_err(|e| wrong("PENDING_FLOWS", e))?,
        })
    }

    /// Removes and returns the original destination of a captured connection.
    pub fn consume(&self, netns: u64, client: SocketAddr, listener: SocketAddr) -> io::Result<Option<SocketAddr>> {
        let key = FlowKey {
            netns,
            client: address(client.ip()),
            listener: address(listener.ip()),
            client_port: client.port(),
            listener_port: listener.port(),
            _pad: 0,
        };
        let ip = |a| std::net::Ipv6Addr::from(a).to_canonical();
        Ok(self.remove(&key)?.map(|o| SocketAddr::new(ip(o.addr), o.port)))
    }

    fn remove(&self, key: &FlowKey) -> io::Result<Option<OriginalDestination>> {
        let taken = self.entries.take(key)?;
        if let Some(entry) = &taken {
            self.count_taken(entry.pod_id, 1);
            self.count_taken(ALL_FLOWS, 1);
        }
        Ok(taken)
    }

    /// Takes so many entries off a count.
    fn count_taken(&self, pod_id: u32, entries: u64) {
        // An entry with a number beyond the array has never been counted.
        if let Some(taken) = self.pending.word(pod_id as usize * WORDS + 1) {
            taken.fetch_add(entries, Relaxed);
        }
    }

    fn read(&self, pod_id: u32) -> PendingFlows {
        let word = |n| self.pending.word(pod_id as usize * WORDS + n).map_or(0, |word| word.load(Relaxed));
        PendingFlows { added: word(0), taken: word(1) }
    }

    /// The entries of all pods, and the pod with most of them, with how many it has. Pods without entries are none.
    pub fn fullest(&self) -> (u64, Option<(u32, u64)>) {
        let counts = self.counts().into_iter().map(|(pod, pending)| (pod, pending.count()));
        let fullest = counts.filter(|(_, entries)| *entries > 0).max_by_key(|(_, entries)| *entries);
        (self.read(ALL_FLOWS).count(), fullest)
    }

    /// How many entries a pod may have now.
    pub fn share(&self) -> u64 {
        flow_share(self.read(ALL_FLOWS).count())
    }

    /// Every pod that has entries, or a wrong count.
    fn counts(&self) -> Seen {
        (1..capacity::PENDING_FLOWS as u32)
            .map(|pod| (pod, self.read(pod)))
            .filter(|(_, pending)| pending.added != pending.taken)
            .collect()
    }

    fn entries(&self) -> Result<Vec<(FlowKey, OriginalDestination)>, String> {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        // When an entry goes while it is being read, the kernel begins again.
        all.iter().take(2 * capacity::FLOWS).collect::<Result<_, _>>().map_err(|e| chain(&e))
    }

    /// Removes the entries that `gone` names. Blocks.
    pub fn forget(&self, gone: impl Fn(u32) -> bool) -> Result<(), CaptureError> {
        let failed = |reason| CaptureError::Bpf { action: "clear map FLOWS".to_owned(), reason };
        for (key, entry) in self.entries().map_err(failed)? {
            if gone(entry.pod_id) {
                // The programs run: it may be gone already.
                self.remove(&key).map_err(|e| failed(e.to_string()))?;
            }
        }
        Ok(())
    }

    /// Removes what is left of a pod that is gone, so that the next pod with its number begins with nothing.
    pub fn forget_pod(&self, pod_id: u32) -> Result<(), CaptureError> {
        if self.read(pod_id).count() == 0 { Ok(()) } else { self.forget(|id| id == pod_id) }
    }

    /// Makes counts what the entries say, as far as nothing has happened to them since `before` and nothing does meanwhile.
    /// `before` becomes what is seen now. Blocks.
    fn recount(&self, before: &mut Seen) -> Result<(), String> {
        let mut now = self.counts();
        now.insert(ALL_FLOWS, self.read(ALL_FLOWS));
        let before = std::mem::replace(before, now.clone());
        let still: Seen = now.into_iter().filter(|(pod, seen)| before.get(pod) == Some(seen)).collect();
        if still.values().all(|seen| seen.added == seen.taken) {
            return Ok(());
        }
        let mut entries: BTreeMap<u32, u64> = BTreeMap::new();
        for (_, entry) in self.entries()? {
            *entries.entry(entry.pod_id).or_default() += 1;
        }
        let all = entries.values().sum();
        entries.insert(ALL_FLOWS, all);
        for (pod, seen) in still {
            let entries = entries.get(&pod).copied().unwrap_or(0);
            // Entries are counted before they are made and until after they are gone, so a count that stands still is theirs.
            let wrong = seen.added.wrapping_sub(seen.taken).wrapping_sub(entries);
            if wrong != 0 && self.read(pod) == seen {
                tracing::warn!(pod, counted = seen.count(), entries, "wrong count of connections that wait; corrected");
                self.count_taken(pod, wrong);
            }
        }
        Ok(())
    }

    /// Counts so many entries more than there are, as an agent leaves it that is killed between an entry and its count.
    #[cfg(test)]
    pub fn miscount(&self, pod_id: u32, entries: u64) {
        self.count_taken(pod_id, entries.wrapping_neg());
        self.count_taken(ALL_FLOWS, entries.wrapping_neg());
    }

    /// At the start of an agent, before there are listeners: every count that no entry explains is an ended agent's.
    pub fn settle(&self) -> Result<(), CaptureError> {
        let mut seen = self.counts();
        seen.insert(ALL_FLOWS, self.read(ALL_FLOWS));
        self.recount(&mut seen)
            .map_err(|reason| CaptureError::Bpf { action: "count what is in map FLOWS".to_owned(), reason })
    }
}

/// Compares counts with entries until the task is dropped.
pub(super) async fn keep_counts(maps: Arc<Maps>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = Seen::new();
    loop {
        ticks.tick().await;
        let maps = Arc::clone(&maps);
        let recounted = tokio::task::spawn_blocking(move || {
            let result = maps.flows.recount(&mut seen);
            (seen, result)
        });
        match recounted.await {
            Ok((now, Ok(()))) => seen = now,
            Ok((now, Err(error))) => {
                tracing::warn!(%error, "cannot go through map FLOWS");
                seen = now;
            }
            Err(error) => {
                return tracing::error!(%error, "the counts of waiting connections are not looked at any more");
            }
        }
    }
}
