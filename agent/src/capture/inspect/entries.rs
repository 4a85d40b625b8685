//! Reads the entries of a pinned map.

use std::{collections::BTreeMap, path::Path};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, lpm_trie::Key};
use serde::Serialize;
use underpass_abi::{
    ALL_FLOWS, Address, COUNTERS, ExcludeKey, FlowKey, MeshEntry, OriginalDestination, PendingFlows, PodConfig,
    PortKey, PortRule, ProbeKey, ProbeSyn, capacity, flow_share,
};

use super::{
    Names, NotListed,
    decode::{self, address, cgroup, counter, destination, excluded_key, flow, mesh_entry, mesh_key, port_key},
    field::{Entry, Fields},
    is_ours, version,
};
use crate::capture::{
    CaptureError,
    desired::ALL_PODS,
    maps::{PINNED, chain},
    object::ABI_HASH,
    pins::Layout,
};

/// What a map holds.
#[derive(Debug, Clone, Serialize)]
pub struct Dump {
    /// Name of the map.
    pub map: String,
    /// Under which version it is pinned.
    pub version: String,
    /// Entries that were read; more than are listed when the limit was reached.
    pub total: usize,
    /// The map was changed so much while it was read that some entries may be missing.
    pub incomplete: bool,
    /// In the order of the keys.
    pub entries: Vec<Entry>,
}

/// Reads a map of this version, at most `limit` entries of it.
pub fn dump(pin_root: &Path, name: &str, limit: usize, names: &Names) -> Result<Dump, CaptureError> {
    let layout = Layout::new(pin_root, ABI_HASH);
    if !PINNED.iter().any(|(n, ..)| *n == name) {
        let all: Vec<_> = PINNED.iter().map(|(n, ..)| *n).collect();
        return Err(failed(name, format!("there is no such map; there are {}", all.join(", "))));
    }
    if let Some(why) = NotListed::of(name) {
        return Err(failed(name, why.as_str().to_owned()));
    }
    let read = read(&layout, name, names).map_err(|reason| failed(name, reason))?;
    let total = read.entries.len();
    let entries = read.entries.into_iter().take(limit).map(|(key, value)| Entry { key, value }).collect();
    Ok(Dump { map: name.to_owned(), version: version(&layout), total, incomplete: read.incomplete, entries })
}

fn failed(name: &str, reason: String) -> CaptureError {
    CaptureError::Bpf { action: format!("read map {name}"), reason }
}

/// How many entries a map has; `None` for those whose entries cannot be listed or read.
pub(super) fn count(layout: &Layout, name: &str) -> Option<usize> {
    (is_ours(layout) && NotListed::of(name).is_none())
        .then(|| read(layout, name, &Names::default()).ok().map(|read| read.entries.len()))
        .flatten()
}

/// The pods, by cookie of their network namespace.
pub(super) fn pods(layout: &Layout) -> Result<BTreeMap<u64, PodConfig>, String> {
    let map: HashMap<_, u64, PodConfig> = open(layout, "PODS")?;
    map.iter().take(2 * capacity::PODS).collect::<Result<_, _>>().map_err(|e| chain(&e))
}

/// Entries in order.
struct Read {
    entries: BTreeMap<Fields, Fields>,
    incomplete: bool,
}

fn open<T: TryFrom<Map, Error = MapError>>(layout: &Layout, name: &str) -> Result<T, String> {
    let path = layout.map(name);
    MapData::from_pin(&path).and_then(Map::from_map_data).and_then(T::try_from).map_err(|e| {
        format!("opening {}: {}; nothing may be pinned there, see `underpass bpf maps`", path.display(), chain(&e))
    })
}

fn read(layout: &Layout, name: &str, names: &Names) -> Result<Read, String> {
    match name {
        "PODS" => {
            hash(layout, name, capacity::PODS, |k: u64, v: PodConfig| (decode::netns(k, names), decode::pod_config(&v)))
        }
        "PODS_BY_ID" => hash(layout, name, capacity::PODS, |k: u32, v: PodConfig| {
            (decode::pod_id(k, names), decode::pod_config(&v))
        }),
        "NODE_INTERFACES" => hash(layout, name, capacity::NODE_INTERFACES, |k: u32, v: u32| {
            (decode::interface(k), decode::pod_id(v, names))
        }),
        "MESH" => trie(layout, name, capacity::MESH, |k: Key<Address>, v: MeshEntry| {
            (mesh_key(k.data(), k.prefix_len()), mesh_entry(v))
        }),
        "EXCLUDED_CIDRS" => trie(layout, name, capacity::EXCLUDED_CIDRS, |k: Key<ExcludeKey>, _: u32| {
            (excluded_key(k.data(), k.prefix_len(), names), decode::nothing())
        }),
        "PORT_RULES" => hash(layout, name, capacity::PORT_RULES, |k: PortKey, v: PortRule| {
            (port_key(k, names), decode::port_rule(v))
        }),
        "PROBE_CGROUPS" => hash(layout, name, capacity::PROBE_CGROUPS, |k: u64, _: u32| (cgroup(k), decode::nothing())),
        "PROBES" => {
            hash(layout, name, capacity::PROBES, |k: ProbeKey, v: ProbeSyn| (decode::probe(&k), decode::probe_syn(&v)))
        }
        "NODE_ADDRESSES" => {
            hash(layout, name, capacity::NODE_ADDRESSES, |k: Address, _: u32| (address(k), decode::nothing()))
        }
        "FLOWS" => {
            hash(layout, name, capacity::FLOWS, |k: FlowKey, v: OriginalDestination| (flow(&k, names), destination(&v)))
        }
        "PENDING_FLOWS" => {
            let waiting =
                pending(layout)?.map(|entry| entry.map(|(id, v)| (decode::pod_id(id, names), decode::pending(&v))));
            collect(waiting, capacity::PENDING_FLOWS)
        }
        "COUNTERS" => counters(layout, name),
        _ => Err("its entries cannot be listed".to_owned()),
    }
}

fn hash<K: aya::Pod, V: aya::Pod>(
    layout: &Layout,
    name: &str,
    capacity: usize,
    decode: impl Fn(K, V) -> (Fields, Fields),
) -> Result<Read, String> {
    let map: HashMap<_, K, V> = open(layout, name)?;
    collect(map.iter().map(|r| r.map(|(k, v)| decode(k, v))), capacity)
}

fn trie<const N: usize, V: aya::Pod>(
    layout: &Layout,
    name: &str,
    capacity: usize,
    decode: impl Fn(Key<[u8; N]>, V) -> (Fields, Fields),
) -> Result<Read, String>
where
    [u8; N]: aya::Pod,
{
    let map: LpmTrie<_, [u8; N], V> = open(layout, name)?;
    collect(map.iter().map(|r| r.map(|(k, v)| decode(k, v))), capacity)
}

/// Pods with connections that wait for the agent.
fn pending(layout: &Layout) -> Result<impl Iterator<Item = Result<(u32, PendingFlows), MapError>>, String> {
    let map: Array<MapData, PendingFlows> = open(layout, "PENDING_FLOWS")?;
    let entry = move |id| map.get(&id, 0).map(|pending| (id, pending));
    Ok((0..capacity::PENDING_FLOWS as u32).map(entry).filter(|e| !e.as_ref().is_ok_and(|(_, v)| v.count() == 0)))
}

/// The pod with most entries in a map that pods share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fullest {
    /// Its number.
    pub pod_id: u32,
    /// Its entries.
    pub entries: u64,
    /// How many a pod may have now.
    pub limit: u64,
}

/// `None` for a map that pods do not share, or in which no pod has entries.
pub(super) fn fullest(layout: &Layout, name: &str) -> Option<Fullest> {
    let mut owners: BTreeMap<u32, u64> = BTreeMap::new();
    let mut limit = capacity::RULES_PER_POD_MOST as u64;
    match name {
        "FLOWS" => {
            owners = pending(layout).ok()?.flatten().map(|(id, pending)| (id, pending.count())).collect();
            limit = flow_share(owners.remove(&ALL_FLOWS).unwrap_or(0));
        }
        "PORT_RULES" => {
            let map: HashMap<_, PortKey, PortRule> = open(layout, name).ok()?;
            let keys = map.keys().flatten().take(2 * capacity::PORT_RULES);
            keys.for_each(|key| *owners.entry(key.pod_id).or_default() += 1);
        }
        "EXCLUDED_CIDRS" => {
            let map: LpmTrie<_, ExcludeKey, u32> = open(layout, name).ok()?;
            let keys = map.keys().flatten().take(2 * capacity::EXCLUDED_CIDRS);
            keys.for_each(|key| {
                let [a, b, c, d, ..] = key.data();
                *owners.entry(u32::from_be_bytes([a, b, c, d])).or_default() += 1;
            });
        }
        _ => return None,
    }
    owners.remove(&ALL_PODS);
    let (pod_id, entries) = owners.into_iter().max_by_key(|(_, entries)| *entries)?;
    Some(Fullest { pod_id, entries, limit })
}

fn counters(layout: &Layout, name: &str) -> Result<Read, String> {
    let map: PerCpuArray<_, u64> = open(layout, name)?;
    let one = |index| map.get(&index, 0).map(|values| (counter(index), decode::count(&values)));
    let entries = (0..COUNTERS.min(map.len())).map(one);
    collect(entries, COUNTERS as usize)
}

/// The kernel goes on from the key before; when that key has been removed, it begins again. So entries may come several times, and a
/// map that changes faster than it is read would never end.
fn collect(entries: impl Iterator<Item = Result<(Fields, Fields), MapError>>, capacity: usize) -> Result<Read, String> {
    let mut read = Read { entries: BTreeMap::new(), incomplete: false };
    for (steps, entry) in entries.enumerate() {
        if steps > 2 * capacity {
            read.incomplete = true;
            break;
        }
        let (key, value) = entry.map_err(|e| chain(&e))?;
        read.entries.insert(key, value);
    }
    Ok(read)
}
