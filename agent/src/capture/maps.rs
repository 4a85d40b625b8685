//! The maps, typed. Everything the agent writes for the programs to read goes through here.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt::Write as _,
    io,
    ops::RangeInclusive,
    os::fd::{AsFd, AsRawFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf,
    maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, RingBuf, lpm_trie::Key},
};
use underpass_abi::{
    Address, COUNTERS, Counter, FlowKey, MeshEntry, OriginalDestination, POD_CAPTURE_ALL, PendingFlows, PodConfig,
    PortKey, PortRule, ProbeKey, ProbeSyn, SOCKET_AGENT, SocketState, capacity,
};

use super::{
    CaptureError,
    desired::{ALL_PODS, MeshState, PRESENT, PodState, PortSlot, Prefix, Rules, Strictness, is_tighter},
    flows::Flows,
    pins::Layout,
    room::{self, Overflow, Room},
    table::{Store, Table},
};
use crate::sys::bpf::SharedMap;

/// Name, key size, value size and number of entries of every pinned map.
pub const PINNED: [(&str, usize, usize, usize); 14] = [
    ("PODS", 8, size_of::<PodConfig>(), capacity::PODS),
    ("PODS_BY_ID", 4, size_of::<PodConfig>(), capacity::PODS),
    ("NODE_INTERFACES", 4, 4, capacity::NODE_INTERFACES),
    ("MESH", 4 + 16, size_of::<MeshEntry>(), capacity::MESH),
    ("EXCLUDED_CIDRS", 4 + 20, 4, capacity::EXCLUDED_CIDRS),
    ("PORT_RULES", size_of::<PortKey>(), size_of::<PortRule>(), capacity::PORT_RULES),
    ("PROBE_CGROUPS", 8, 4, capacity::PROBE_CGROUPS),
    ("PROBES", size_of::<ProbeKey>(), size_of::<ProbeSyn>(), capacity::PROBES),
    ("NODE_ADDRESSES", size_of::<Address>(), 4, capacity::NODE_ADDRESSES),
    ("SOCKETS", 4, size_of::<SocketState>(), 0),
    ("FLOWS", size_of::<FlowKey>(), size_of::<OriginalDestination>(), capacity::FLOWS),
    ("PENDING_FLOWS", 4, size_of::<PendingFlows>(), capacity::PENDING_FLOWS),
    ("EVENTS", 0, 0, capacity::EVENTS_BYTES),
    ("COUNTERS", 4, 8, COUNTERS as usize),
];

/// The maps the agent reads and writes.
pub struct Maps {
    /// Captured connections that have not been accepted.
    pub flows: Flows,
    sockets: SharedMap<i32, SocketState>,
    counters: PerCpuArray<MapData, u64>,
    tables: Mutex<Tables>,
}

/// The maps that are written by difference.
pub struct Tables {
    pods: Table<HashStore<u64, PodConfig>>,
    pods_by_id: Table<HashStore<u32, PodConfig>>,
    node_interfaces: Table<HashStore<u32, u32>>,
    mesh: Table<TrieStore<16, MeshEntry>>,
    excluded: Table<TrieStore<20, u32>>,
    ports: Table<PortStore>,
    probe_cgroups: Table<HashStore<u64, u32>>,
    node_addresses: Table<HashStore<Address, u32>>,
}

impl Maps {
    /// Takes the maps out of a loaded object; the ring buffer goes to who reads events. `mesh_entries` is how many entries of
    /// `MESH` are used at most.
    pub fn take(bpf: &mut Ebpf, mesh_entries: usize) -> Result<(Self, RingBuf<MapData>), CaptureError> {
        let tables = Tables {
            pods: hash_table(bpf, "PODS", capacity::PODS)?,
            pods_by_id: hash_table(bpf, "PODS_BY_ID", capacity::PODS)?,
            node_interfaces: hash_table(bpf, "NODE_INTERFACES", capacity::NODE_INTERFACES)?,
            mesh: Table::new("MESH", mesh_entries.min(capacity::MESH), TrieStore(typed(bpf, "MESH")?))?,
            excluded: Table::new("EXCLUDED_CIDRS", capacity::EXCLUDED_CIDRS, TrieStore(typed(bpf, "EXCLUDED_CIDRS")?))?,
            ports: Table::new("PORT_RULES", capacity::PORT_RULES, PortStore(typed(bpf, "PORT_RULES")?))?,
            probe_cgroups: hash_table(bpf, "PROBE_CGROUPS", capacity::PROBE_CGROUPS)?,
            node_addresses: hash_table(bpf, "NODE_ADDRESSES", capacity::NODE_ADDRESSES)?,
        };
        let maps = Self {
            flows: Flows::take(bpf)?,
            sockets: shared(bpf, "SOCKETS")?,
            counters: typed(bpf, "COUNTERS")?,
            tables: Mutex::new(tables),
        };
        Ok((maps, typed(bpf, "EVENTS")?))
    }

    /// The written maps.
    pub fn tables(&self) -> MutexGuard<'_, Tables> {
        // A panic between a write and its mirror leaves at worst a superfluous write; the tables stay usable.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Flags a socket as the agent's.
    pub fn mark_own(&self, socket: impl AsFd) -> io::Result<()> {
        let state = SocketState { flags: SOCKET_AGENT, ..SocketState::default() };
        self.sockets.insert(&socket.as_fd().as_raw_fd(), &state)
    }

    /// The programs' counters, summed over the processors.
    pub fn counters(&self) -> Result<BTreeMap<String, u64>, CaptureError> {
        let read =
            |c: Counter| self.counters.get(&(c as u32), 0).map(|v| v.iter().fold(0, |a: u64, n| a.wrapping_add(*n)));
        Counter::ALL
            .iter()
            .map(|(c, name)| Ok(((*name).to_owned(), read(*c)?)))
            .collect::<Result<_, MapError>>()
            .map_err(|e| CaptureError::Bpf { action: "read map COUNTERS".to_owned(), reason: chain(&e) })
    }
}

impl Tables {
    /// Pods in the maps: namespace cookie and configuration.
    pub fn pods(&self) -> &BTreeMap<u64, PodConfig> {
        self.pods.contents()
    }

    /// Numbers that have an entry anywhere.
    pub fn pod_ids(&self) -> impl Iterator<Item = u32> + '_ {
        let by_id = self.pods_by_id.contents().keys().copied();
        let interfaces = self.node_interfaces.contents().values().copied();
        self.pods()
            .values()
            .map(|c| c.pod_id)
            .chain(by_id)
            .chain(self.port_owners())
            .chain(self.cidr_owners())
            .chain(interfaces)
    }

    /// Whose the port rules are, one pod's after the other's; [`ALL_PODS`] for those of all pods.
    pub fn port_owners(&self) -> impl Iterator<Item = u32> + '_ {
        self.ports.contents().keys().map(|slot| slot.pod_id)
    }

    /// The same for excluded networks.
    pub fn cidr_owners(&self) -> impl Iterator<Item = u32> + '_ {
        self.excluded.contents().keys().map(|prefix| {
            let [a, b, c, d, ..] = prefix.bytes;
            u32::from_be_bytes([a, b, c, d])
        })
    }

    /// A pod's configuration as the tc programs see it.
    pub fn pod(&self, id: u32) -> Option<&PodConfig> {
        self.pods_by_id.contents().get(&id)
    }

    /// The rules in force for a pod, or for all.
    pub fn rules(&self, pod_id: u32) -> Rules {
        Rules {
            excluded: self.excluded.contents().range(excluded_scope(pod_id)).map(|(k, v)| (*k, *v)).collect(),
            ports: self.ports.contents().range(port_scope(pod_id)).map(|(k, v)| (*k, *v)).collect(),
        }
    }

    /// Which inbound ports of a pod with this configuration refuse plaintext, by the rules in the maps.
    pub fn strictness(&self, config: &PodConfig) -> Strictness {
        Strictness::new(config, &self.rules(config.pod_id), &self.rules(ALL_PODS))
    }

    /// How full the maps are that the agent writes: name, entries, room.
    pub fn sizes(&self) -> Vec<(&'static str, usize, usize)> {
        vec![
            ("PODS", self.pods.contents().len(), capacity::PODS),
            ("NODE_INTERFACES", self.node_interfaces.contents().len(), capacity::NODE_INTERFACES),
            ("MESH", self.mesh.contents().len(), self.mesh.capacity()),
            ("EXCLUDED_CIDRS", self.excluded.contents().len(), capacity::EXCLUDED_CIDRS),
            ("PORT_RULES", self.ports.contents().len(), capacity::PORT_RULES),
            ("PROBE_CGROUPS", self.probe_cgroups.contents().len(), capacity::PROBE_CGROUPS),
            ("NODE_ADDRESSES", self.node_addresses.contents().len(), capacity::NODE_ADDRESSES),
        ]
    }

    /// Makes the mesh's addresses those of `state`. Nothing is written when the map is too small.
    pub fn apply_mesh(&mut self, state: &MeshState) -> Result<(), CaptureError> {
        self.mesh.reconcile(EVERYTHING, &state.mesh)
    }

    /// Captures all that pods send, to whatever address, also of pods that an earlier agent has enrolled and this one has not.
    pub fn capture_everything(&mut self) -> Result<(), CaptureError> {
        let everything = |config: &PodConfig| PodConfig { flags: config.flags | POD_CAPTURE_ALL, ..*config };
        let by_id: Vec<_> = self.pods_by_id.contents().iter().map(|(id, config)| (*id, everything(config))).collect();
        let pods: Vec<_> = self.pods().iter().map(|(netns, config)| (*netns, everything(config))).collect();
        for (netns, config) in pods {
            self.pods.insert(netns, config)?;
        }
        by_id.into_iter().try_for_each(|(id, config)| self.pods_by_id.insert(id, config))
    }

    /// Makes mesh-wide exclusions those of `state`, as far as they fit.
    pub fn apply_mesh_rules(&mut self, state: &MeshState) -> Result<Overflow, CaptureError> {
        let (rules, overflow) = state.rules.clone().fit_all_pods();
        self.apply_rules(ALL_PODS, &rules)?;
        Ok(overflow)
    }

    /// Makes the node's addresses those of `state`, as far as they fit. How many there are and fit, when these are fewer.
    pub fn apply_node_addresses(&mut self, state: &MeshState) -> Result<Option<(usize, usize)>, CaptureError> {
        let mut addresses = state.node_addresses.clone();
        let overflow = room::keep_first(&mut addresses, capacity::NODE_ADDRESSES);
        self.node_addresses.reconcile(EVERY_ADDRESS, &addresses)?;
        Ok(overflow)
    }

    /// Makes single entries of the mesh what they are to be; `None` is absent. Nothing is written when the map is too small.
    pub fn change_mesh(&mut self, changes: &BTreeMap<Prefix<16>, Option<MeshEntry>>) -> Result<(), CaptureError> {
        self.mesh.change(changes)
    }

    /// Makes these cgroups, by kernel id, the probe cgroups.
    pub fn apply_probe_cgroups(&mut self, ids: impl IntoIterator<Item = u64>) -> Result<(), CaptureError> {
        let wanted = ids.into_iter().map(|id| (id, PRESENT)).collect();
        self.probe_cgroups.reconcile(0..=u64::MAX, &wanted)
    }

    /// The addresses whose plaintext declared probe ports take.
    pub fn node_addresses(&self) -> impl Iterator<Item = &Address> {
        self.node_addresses.contents().keys()
    }

    /// The probe cgroups.
    #[cfg(test)]
    pub fn probe_cgroups(&self) -> Vec<u64> {
        self.probe_cgroups.contents().keys().copied().collect()
    }

    /// Writes what the tc programs need to know of a pod, and its rules as far as they fit. Returns the configuration that is
    /// in force, and what did not fit.
    pub fn apply_pod(&mut self, state: PodState) -> Result<(PodConfig, Overflow), CaptureError> {
        let id = state.config.pod_id;
        let (state, overflow) = state.fit(self.room(id));
        // A rule may only go when the pod refuses without the rule what it refused with it.
        if self.pod(id).is_some_and(|before| is_tighter(&state.config, before)) {
            self.pods_by_id.insert(id, state.config)?;
        }
        self.apply_rules(id, &state.rules)?;
        self.pods_by_id.insert(id, state.config)?;
        Ok((state.config, overflow))
    }

    /// The room for a pod's rules.
    fn room(&self, id: u32) -> Room {
        let rooms = |all: usize, own: usize, for_all_pods: usize| room::for_pod(own, all - own - for_all_pods);
        let (ports, cidrs) = (self.ports.contents(), self.excluded.contents());
        Room {
            ports: rooms(ports.len(), ports.range(port_scope(id)).count(), ports.range(port_scope(ALL_PODS)).count()),
            cidrs: rooms(
                cidrs.len(),
                cidrs.range(excluded_scope(id)).count(),
                cidrs.range(excluded_scope(ALL_PODS)).count(),
            ),
        }
    }

    /// Which pods the node's interfaces lead to, by the interfaces' indices.
    pub fn node_interfaces(&self) -> &BTreeMap<u32, u32> {
        self.node_interfaces.contents()
    }

    /// Says which pod an interface of the node leads to; `None` forgets it.
    pub fn set_node_interface(&mut self, index: u32, pod_id: Option<u32>) -> Result<(), CaptureError> {
        match pod_id {
            Some(pod_id) => self.node_interfaces.insert(index, pod_id),
            None => self.node_interfaces.remove(&index),
        }
    }

    /// Turns capture on for a namespace, or gives a captured one another configuration.
    pub fn capture(&mut self, netns: u64, config: PodConfig) -> Result<(), CaptureError> {
        self.pods.insert(netns, config)
    }

    /// Turns capture off.
    pub fn release(&mut self, netns: u64) -> Result<(), CaptureError> {
        self.pods.remove(&netns)
    }

    /// Forgets a pod: its programs must be gone.
    pub fn forget(&mut self, id: u32) -> Result<(), CaptureError> {
        self.pods_by_id.remove(&id)?;
        self.apply_rules(id, &Rules::default())
    }

    fn apply_rules(&mut self, pod_id: u32, rules: &Rules) -> Result<(), CaptureError> {
        self.excluded.reconcile(excluded_scope(pod_id), &rules.excluded)?;
        self.ports.reconcile(port_scope(pod_id), &rules.ports)
    }
}

const EVERYTHING: RangeInclusive<Prefix<16>> =
    Prefix { bytes: [0; 16], bits: 0 }..=Prefix { bytes: [0xff; 16], bits: u32::MAX };

const EVERY_ADDRESS: RangeInclusive<Address> = [0; 16]..=[0xff; 16];

fn port_scope(pod_id: u32) -> RangeInclusive<PortSlot> {
    PortSlot { pod_id, direction: 0, port: 0 }..=PortSlot { pod_id, direction: u16::MAX, port: u16::MAX }
}

fn excluded_scope(pod_id: u32) -> RangeInclusive<Prefix<20>> {
    let key = |fill, bits| {
        let mut bytes = [fill; 20];
        bytes[..4].copy_from_slice(&pod_id.to_be_bytes());
        Prefix { bytes, bits }
    };
    key(0, 0)..=key(0xff, u32::MAX)
}

/// Checks that the maps just loaded, which may be an earlier agent's, are what this agent expects, and that there is no
/// other.
pub fn check_pinned(bpf: &Ebpf, layout: &Layout) -> Result<(), CaptureError> {
    for (name, key, value, entries) in PINNED {
        let failed = |reason: String| CaptureError::Bpf {
            action: format!("use map {}", layout.map(name).display()),
            reason: format!("{reason}; `underpass cleanup` removes what another build left"),
        };
        let info = MapData::from_pin(layout.map(name)).and_then(|m| m.info()).map_err(|e| failed(chain(&e)))?;
        let found = (info.key_size() as usize, info.value_size() as usize, info.max_entries() as usize);
        if found != (key, value, entries) {
            return Err(failed(format!(
                "key size, value size and entries are {found:?}, expected {:?}",
                (key, value, entries)
            )));
        }
    }
    for (name, _) in bpf.maps() {
        let private = name.starts_with('.') || name == super::loader::LOG_MAP;
        if !private && !PINNED.iter().any(|(n, ..)| *n == name) {
            return Err(CaptureError::Bpf {
                action: format!("load map {name}"),
                reason: "the object has a map the agent does not know; build both from one source".to_owned(),
            });
        }
    }
    Ok(())
}

fn typed<T>(bpf: &mut Ebpf, name: &'static str) -> Result<T, CaptureError>
where
    T: TryFrom<Map, Error = MapError>,
{
    T::try_from(take(bpf, name)?).map_err(|e| failed(name, chain(&e)))
}

fn shared<K: aya::Pod, V: aya::Pod>(bpf: &mut Ebpf, name: &'static str) -> Result<SharedMap<K, V>, CaptureError> {
    let (Map::HashMap(data) | Map::LruHashMap(data) | Map::SkStorage(data)) = take(bpf, name)? else {
        return Err(failed(name, "not a hash or socket-storage map".to_owned()));
    };
    let fd = data.fd().as_fd().try_clone_to_owned();
    fd.and_then(SharedMap::new).map_err(|e| failed(name, e.to_string()))
}

/// Takes a map out of a loaded object.
pub fn take(bpf: &mut Ebpf, name: &'static str) -> Result<Map, CaptureError> {
    bpf.take_map(name).ok_or_else(|| failed(name, "the object has no such map".to_owned()))
}

pub fn failed(name: &str, reason: String) -> CaptureError {
    CaptureError::Bpf { action: format!("open map {name}"), reason }
}

/// An error with its causes: aya's messages leave out the kernel's answer.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        let _ = write!(text, ": {e}");
        source = e.source();
    }
    text
}

fn hash_table<K, V>(bpf: &mut Ebpf, name: &'static str, capacity: usize) -> Result<Table<HashStore<K, V>>, CaptureError>
where
    K: aya::Pod + Ord,
    V: aya::Pod + PartialEq,
{
    Table::new(name, capacity, HashStore(typed(bpf, name)?))
}

/// A hash map.
struct HashStore<K, V>(HashMap<MapData, K, V>);

impl<K: aya::Pod + Ord, V: aya::Pod + PartialEq> Store for HashStore<K, V> {
    type Key = K;
    type Value = V;

    fn entries(&self) -> Result<BTreeMap<K, V>, String> {
        self.0.iter().collect::<Result<_, _>>().map_err(|e| chain(&e))
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), String> {
        self.0.insert(key, value, 0).map_err(|e| chain(&e))
    }

    fn remove(&mut self, key: &K) -> Result<(), String> {
        gone_is_fine(self.0.remove(key))
    }
}

/// A longest-prefix-match trie.
struct TrieStore<const N: usize, V>(LpmTrie<MapData, [u8; N], V>);

impl<const N: usize, V: aya::Pod + PartialEq> Store for TrieStore<N, V> {
    type Key = Prefix<N>;
    type Value = V;

    fn entries(&self) -> Result<BTreeMap<Prefix<N>, V>, String> {
        let entry = |(k, v): (Key<[u8; N]>, V)| (Prefix { bytes: k.data(), bits: k.prefix_len() }, v);
        self.0.iter().map(|r| r.map(entry)).collect::<Result<_, _>>().map_err(|e| chain(&e))
    }

    fn insert(&mut self, key: &Prefix<N>, value: &V) -> Result<(), String> {
        self.0.insert(&Key::new(key.bits, key.bytes), value, 0).map_err(|e| chain(&e))
    }

    fn remove(&mut self, key: &Prefix<N>) -> Result<(), String> {
        gone_is_fine(self.0.remove(&Key::new(key.bits, key.bytes)))
    }
}

/// `PORT_RULES`, whose keys have no order of their own.
struct PortStore(HashMap<MapData, PortKey, PortRule>);

impl Store for PortStore {
    type Key = PortSlot;
    type Value = PortRule;

    fn entries(&self) -> Result<BTreeMap<PortSlot, PortRule>, String> {
        self.0.iter().map(|r| r.map(|(k, v)| (k.into(), v))).collect::<Result<_, _>>().map_err(|e| chain(&e))
    }

    fn insert(&mut self, key: &PortSlot, value: &PortRule) -> Result<(), String> {
        self.0.insert(PortKey::from(*key), value, 0).map_err(|e| chain(&e))
    }

    fn remove(&mut self, key: &PortSlot) -> Result<(), String> {
        gone_is_fine(self.0.remove(&PortKey::from(*key)))
    }
}

fn gone_is_fine(result: Result<(), MapError>) -> Result<(), String> {
    match result {
        Err(MapError::SyscallError(e)) if e.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| chain(&e)),
    }
}
