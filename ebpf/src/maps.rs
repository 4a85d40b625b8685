//! Every map of the object. This file is part of the ABI hash: pinned maps are only reused when it did not change.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_RINGBUF},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage},
    helpers::generated::{bpf_ringbuf_reserve, bpf_ringbuf_submit},
    macros::btf_map,
};
use underpass_abi::{
    Address, COUNTERS as COUNTER_COUNT, ExcludeKey, FlowKey, MeshEntry, OriginalDestination, PendingFlows, PodConfig,
    PortKey, PortRule, ProbeKey, ProbeSyn, SocketState, capacity,
};

/// Memory is taken as entries come: most nodes use a fraction of the capacities.
const GROWING: usize = BPF_F_NO_PREALLOC as usize;

/// Enrolled pods by network namespace cookie.
#[btf_map]
pub static PODS: HashMap<u64, PodConfig, { capacity::PODS }, GROWING> = HashMap::new();

/// Enrolled pods by number.
#[btf_map]
pub static PODS_BY_ID: HashMap<u32, PodConfig, { capacity::PODS }, GROWING> = HashMap::new();

/// Numbers of pods by the index of the node's interface that leads to the pod. The guard on the
/// node's side is one program for all pods, and knows them by the interface it runs on.
#[btf_map]
pub static NODE_INTERFACES: HashMap<u32, u32, { capacity::NODE_INTERFACES }, GROWING> = HashMap::new();

/// Addresses that belong to the mesh.
#[btf_map]
pub static MESH: LpmTrie<Address, MeshEntry, { capacity::MESH }> = LpmTrie::new();

/// Destinations that are left alone; the value says nothing.
#[btf_map]
pub static EXCLUDED_CIDRS: LpmTrie<ExcludeKey, u32, { capacity::EXCLUDED_CIDRS }> = LpmTrie::new();

/// Ports treated differently from the rest of their pod.
#[btf_map]
pub static PORT_RULES: HashMap<PortKey, PortRule, { capacity::PORT_RULES }, GROWING> = HashMap::new();

/// cgroups whose sockets send kubelet probes, by kernel id; the value says nothing.
#[btf_map]
pub static PROBE_CGROUPS: HashMap<u64, u32, { capacity::PROBE_CGROUPS }, GROWING> = HashMap::new();

/// Connections that the probe cgroups have just begun to open.
#[btf_map]
pub static PROBES: LruHashMap<ProbeKey, ProbeSyn, { capacity::PROBES }> = LruHashMap::new();

/// The node's own addresses, when declared probe ports take plaintext from all of them; the value
/// says nothing.
#[btf_map]
pub static NODE_ADDRESSES: HashMap<Address, u32, { capacity::NODE_ADDRESSES }, GROWING> = HashMap::new();

/// State of the agent's sockets and of captured ones.
#[btf_map]
pub static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// Captured connections that the agent has not accepted yet.
#[btf_map]
pub static FLOWS: HashMap<FlowKey, OriginalDestination, { capacity::FLOWS }, GROWING> = HashMap::new();

/// How many entries of [`FLOWS`] are whose; see [`crate::pending`].
#[btf_map]
pub static PENDING_FLOWS: Array<PendingFlows, { capacity::PENDING_FLOWS }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// What was refused, for people; see [`COUNTERS`] for numbers.
#[btf_map]
pub static EVENTS: RingBuffer<{ capacity::EVENTS_BYTES }> = RingBuffer::new();

/// `underpass_abi::Counter`s.
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { COUNTER_COUNT as usize }> = PerCpuArray::new();

/// The pod whose interface a tc program is on; the loader sets it.
#[unsafe(no_mangle)]
pub static POD_ID: Global<u32> = Global::new(0);

/// A ring buffer as libbpf wants it defined: without the type of its values, which `aya_ebpf::btf_maps::RingBuf` states.
#[repr(C)]
pub struct RingBuffer<const BYTES: usize> {
    r#type: *const [i32; BPF_MAP_TYPE_RINGBUF as usize],
    max_entries: *const [i32; BYTES],
}

// SAFETY: the pointers only carry types for the loader; nothing follows them.
unsafe impl<const BYTES: usize> Sync for RingBuffer<BYTES> {}

impl<const BYTES: usize> RingBuffer<BYTES> {
    /// The definition that the loader turns into a map.
    pub const fn new() -> Self {
        Self { r#type: core::ptr::null(), max_entries: core::ptr::null() }
    }

    /// Sends one record; it is lost when the ring is full.
    #[inline(always)]
    pub fn send<T>(&self, record: T) {
        const { assert!(align_of::<T>() <= 8, "the kernel aligns records to 8 bytes") };
        let map = core::ptr::from_ref(self).cast_mut().cast();
        // SAFETY: the kernel returns null or `size_of::<T>()` writable bytes, which are submitted exactly once.
        unsafe {
            let slot = bpf_ringbuf_reserve(map, size_of::<T>() as u64, 0).cast::<T>();
            if !slot.is_null() {
                slot.write(record);
                bpf_ringbuf_submit(slot.cast(), 0);
            }
        }
    }
}
