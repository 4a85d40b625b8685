//! The agent's object, loaded through libbpf instead of aya, and its maps.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs::File,
    net::IpAddr,
    os::fd::{AsFd as _, AsRawFd},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::Pod;
use libbpf_rs::{
    Link, Map, MapCore as _, MapFlags, Object, ObjectBuilder, OpenObject, ProgramInput, ProgramMut, RingBufferBuilder,
    TcAttachPoint, TcHookBuilder,
};
use underpass::capture::object::OBJECT;
use underpass_abi::{
    Address, Counter, Event, FlowKey, MESH_CAPTURE, MeshEntry, OriginalDestination, PendingFlows, PodConfig, PortKey,
    PortRule, SocketState,
};

use crate::packet::{Link as LinkLayer, Packet};

/// Number of the pod that the tc programs are loaded for.
pub const POD: u32 = 7;

/// What a tc program said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// `TC_ACT_UNSPEC`: the next program decides.
    Pass,
    /// `TC_ACT_SHOT`.
    Drop,
    /// `TC_ACT_REDIRECT`: the packet, changed, goes elsewhere.
    Redirect,
}

/// Which tc program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The egress guard inside the pod.
    Guard,
    /// The guard on the node's side, whose interfaces all have an Ethernet header.
    NodeGuard,
    /// The ingress program.
    Inbound,
}

/// The loaded object.
pub struct Loaded {
    object: Object,
}

impl Loaded {
    /// Loads it for pod [`POD`]; the verifier has accepted every program when this returns.
    pub fn new() -> Result<Self> {
        Self::with(|_| Ok(()))
    }

    /// Loads it after `change`.
    pub fn with(change: impl FnOnce(&mut OpenObject) -> Result<()>) -> Result<Self> {
        let mut open = ObjectBuilder::default().open_memory(OBJECT).context("opening the object with libbpf")?;
        let mut rodata = open
            .maps_mut()
            .find(|map| map.name().to_string_lossy().ends_with(".rodata"))
            .context("the object has no .rodata")?;
        let value = rodata.initial_value_mut().context(".rodata has no contents")?;
        ensure!(value.len() == 4, ".rodata holds {} bytes, more than POD_ID", value.len());
        value.copy_from_slice(&POD.to_ne_bytes());
        change(&mut open)?;
        Ok(Self { object: open.load().context("loading the object with libbpf")? })
    }

    /// A map by name.
    pub fn map(&self, name: &str) -> Result<Map<'_>> {
        self.object.maps().find(|map| map.name() == name).with_context(|| format!("no map {name}"))
    }

    /// All maps: name, type, key size, value size, entries, flags.
    pub fn maps(&self) -> impl Iterator<Item = Map<'_>> {
        self.object.maps()
    }

    /// A program by name.
    pub fn program(&self, name: &str) -> Result<ProgramMut<'_>> {
        self.object.progs_mut().find(|program| program.name() == name).with_context(|| format!("no program {name}"))
    }

    /// Names of all programs.
    pub fn program_names(&self) -> Vec<String> {
        self.object.progs().map(|program| program.name().to_string_lossy().into_owned()).collect()
    }

    /// Attaches a program to a cgroup until the link is dropped.
    pub fn attach_cgroup(&self, program: &str, cgroup: &File) -> Result<Link> {
        self.program(program)?.attach_cgroup(cgroup.as_raw_fd()).with_context(|| format!("attaching {program}"))
    }

    /// Attaches a tc program to an interface of the current namespace, with which it goes.
    pub fn attach_tc(&self, program: &str, interface: &str, point: TcAttachPoint) -> Result<()> {
        let program = self.program(program)?;
        let index = nix::net::if_::if_nametoindex(interface).with_context(|| format!("looking up {interface}"))?;
        let mut builder = TcHookBuilder::new(program.as_fd());
        builder.ifindex(index.cast_signed()).handle(1).priority(1);
        let mut hook = builder.hook(point);
        hook.create().with_context(|| format!("adding a clsact qdisc to {interface}"))?;
        hook.attach().with_context(|| format!("attaching to {interface}"))?;
        Ok(())
    }

    /// Runs a tc program over a packet.
    pub fn run(&self, direction: Direction, link: LinkLayer, packet: &[u8]) -> Result<Verdict> {
        Ok(self.turned(direction, link, packet)?.0)
    }

    /// The same, with what has become of the packet.
    pub fn turned(&self, direction: Direction, link: LinkLayer, packet: &[u8]) -> Result<(Verdict, Vec<u8>)> {
        let name = match (direction, link) {
            (Direction::Guard, LinkLayer::None) => underpass_abi::programs::GUARD_L3,
            (Direction::Guard, _) => underpass_abi::programs::GUARD,
            (Direction::NodeGuard, _) => underpass_abi::programs::NODE_GUARD,
            (Direction::Inbound, LinkLayer::None) => underpass_abi::programs::INBOUND_L3,
            (Direction::Inbound, _) => underpass_abi::programs::INBOUND,
        };
        let mut after = vec![0; packet.len()];
        let input = ProgramInput { data_in: Some(packet), data_out: Some(&mut after), ..ProgramInput::default() };
        let output =
            self.program(name)?.test_run(input).with_context(|| format!("running {name} over {packet:02x?}"))?;
        let verdict = match output.return_value.cast_signed() {
            -1 => Verdict::Pass,
            2 => Verdict::Drop,
            7 => Verdict::Redirect,
            other => anyhow::bail!("{name} returned {other} for {packet:02x?}"),
        };
        let length = output.data.map_or(0, |data| data.len());
        after.truncate(length);
        Ok((verdict, after))
    }

    /// Runs a packet, and panics unless exactly `expected` is counted and the verdict goes with it (`None`: passed, nothing
    /// counted). A case is tried behind every link header.
    pub fn expect(&self, direction: Direction, case: &str, packet: &Packet, expected: Option<Counter>) -> Result<()> {
        let links = LinkLayer::ALL.into_iter().filter(|link| direction != Direction::NodeGuard || !link.is_empty());
        for link in links {
            self.expect_bytes(direction, &format!("{case}, {link:?}"), link, &packet.bytes(link), expected)?;
        }
        Ok(())
    }

    /// [`expect`](Self::expect) for bytes behind one link header.
    pub fn expect_bytes(
        &self,
        direction: Direction,
        case: &str,
        link: LinkLayer,
        packet: &[u8],
        expected: Option<Counter>,
    ) -> Result<()> {
        let before = self.counters()?;
        let verdict = self.run(direction, link, packet)?;
        let after = self.counters()?;
        let counted: Vec<_> = after.iter().filter(|&(name, value)| before[name] != *value).collect();
        let wanted: Vec<_> = expected.iter().map(|counter| (name(*counter), before[name(*counter)] + 1)).collect();
        let wanted: Vec<_> = wanted.iter().map(|(name, value)| (name, value)).collect();
        assert_eq!(counted, wanted, "{direction:?}, {case}: what was counted");
        let passes = [Counter::InboundAssigned, Counter::InboundProbe];
        let drops = expected.is_some_and(|counter| !passes.contains(&counter));
        // The interface of these runs has another address than the packets, so none of them is
        // answered.
        let wanted = if drops { Verdict::Drop } else { Verdict::Pass };
        assert_eq!(verdict, wanted, "{direction:?}, {case}: verdict");
        Ok(())
    }

    /// The counters, summed over CPUs.
    pub fn counters(&self) -> Result<BTreeMap<&'static str, u64>> {
        let map = self.map("COUNTERS")?;
        Counter::ALL
            .iter()
            .map(|&(counter, name)| {
                let key = (counter as u32).to_ne_bytes();
                let cpus = map.lookup_percpu(&key, MapFlags::ANY)?.with_context(|| format!("no counter {name}"))?;
                let mut sum = 0;
                for cpu in cpus {
                    sum += u64::from_ne_bytes(cpu.as_slice().try_into().context("a counter is 8 bytes")?);
                }
                Ok((name, sum))
            })
            .collect()
    }

    /// One counter.
    pub fn counter(&self, counter: Counter) -> Result<u64> {
        Ok(self.counters()?[name(counter)])
    }

    /// The events waiting in the ring.
    pub fn events(&self) -> Result<Vec<Event>> {
        self.events_within(Duration::ZERO)
    }

    /// The same, after waiting for the first one at most this long.
    pub fn events_within(&self, timeout: Duration) -> Result<Vec<Event>> {
        let events = Rc::new(RefCell::new(Vec::new()));
        let map = self.map("EVENTS")?;
        let mut builder = RingBufferBuilder::new();
        let sink = Rc::clone(&events);
        builder.add(&map, move |bytes| {
            sink.borrow_mut().push(bytes.to_vec());
            0
        })?;
        let ring = builder.build()?;
        ring.poll(timeout)?;
        drop(ring);
        events.take().iter().map(|bytes| event(bytes)).collect()
    }

    /// Registers the pod for the cgroup hooks and for the tc programs.
    pub fn pod(&self, netns_cookie: u64, flags: u32, addr4: Option<IpAddr>, addr6: Option<IpAddr>) -> Result<()> {
        let zero = [0; 16];
        let config =
            PodConfig { pod_id: POD, flags, addr4: addr4.map_or(zero, address), addr6: addr6.map_or(zero, address) };
        self.update("PODS", &netns_cookie, &config)?;
        self.update("PODS_BY_ID", &POD, &config)
    }

    /// Sets only what tc programs see of the pod.
    pub fn pod_by_id(&self, flags: u32) -> Result<()> {
        self.update("PODS_BY_ID", &POD, &PodConfig { pod_id: POD, flags, ..PodConfig::default() })
    }

    /// Says which pod an interface of the node leads to.
    pub fn node_interface(&self, index: u32, pod_id: u32) -> Result<()> {
        self.update("NODE_INTERFACES", &index, &pod_id)
    }

    /// Makes a prefix captured, or a hole.
    pub fn mesh(&self, network: IpAddr, prefix: u32, captured: bool) -> Result<()> {
        let mut key = v4_offset(network, prefix).to_ne_bytes().to_vec();
        key.extend(address(network));
        let flags = if captured { MESH_CAPTURE } else { 0 };
        self.map("MESH")?.update(&key, bytes(&MeshEntry { flags }), MapFlags::ANY).context("updating MESH")
    }

    /// Excludes a network for a pod, or for all (0).
    pub fn exclude(&self, pod_id: u32, network: IpAddr, prefix: u32) -> Result<()> {
        let mut key = (32 + v4_offset(network, prefix)).to_ne_bytes().to_vec();
        key.extend(pod_id.to_be_bytes());
        key.extend(address(network));
        self.map("EXCLUDED_CIDRS")?.update(&key, &1u32.to_ne_bytes(), MapFlags::ANY).context("updating EXCLUDED_CIDRS")
    }

    /// Sets the rule for a port.
    pub fn port_rule(&self, pod_id: u32, port: u16, direction: u16, action: u32) -> Result<()> {
        self.update("PORT_RULES", &PortKey { pod_id, port, direction }, &PortRule { action })
    }

    /// Makes sockets of a cgroup, by kernel id, those of probes.
    pub fn probe_cgroup(&self, id: u64) -> Result<()> {
        self.update("PROBE_CGROUPS", &id, &1u32)
    }

    /// Makes probes from an address welcome on ports with a probe rule.
    pub fn node_address(&self, ip: IpAddr) -> Result<()> {
        self.update("NODE_ADDRESSES", &address(ip), &1u32)
    }

    /// Marks a socket as the agent's.
    pub fn mark_agents(&self, socket: &impl AsRawFd) -> Result<()> {
        let state = SocketState { flags: underpass_abi::SOCKET_AGENT, ..SocketState::default() };
        self.update("SOCKETS", &socket.as_raw_fd(), &state)
    }

    /// The flows waiting for the agent.
    pub fn flows(&self) -> Result<Vec<(FlowKey, OriginalDestination)>> {
        let map = self.map("FLOWS")?;
        let mut flows = Vec::new();
        for key in map.keys() {
            if let Some(value) = map.lookup(&key, MapFlags::ANY)? {
                flows.push((read(&key)?, read(&value)?));
            }
        }
        Ok(flows)
    }

    /// The counted flows of a pod, or of all.
    pub fn pending(&self, index: u32) -> Result<PendingFlows> {
        let value = self.map("PENDING_FLOWS")?.lookup(&index.to_ne_bytes(), MapFlags::ANY)?;
        read(&value.with_context(|| format!("no element {index}"))?)
    }

    /// Sets an entry.
    pub fn update<K: Pod, V: Pod>(&self, map: &str, key: &K, value: &V) -> Result<()> {
        self.map(map)?.update(bytes(key), bytes(value), MapFlags::ANY).with_context(|| format!("updating {map}"))
    }

    /// An entry.
    pub fn lookup<K: Pod, V: Pod>(&self, map: &str, key: &K) -> Result<Option<V>> {
        let value = self.map(map)?.lookup(bytes(key), MapFlags::ANY).with_context(|| format!("reading {map}"))?;
        value.map(|value| read(&value)).transpose()
    }

    /// Removes an entry.
    pub fn delete<K: Pod>(&self, map: &str, key: &K) -> Result<()> {
        self.map(map)?.delete(bytes(key)).with_context(|| format!("deleting from {map}"))
    }
}

/// A counter's name.
pub fn name(counter: Counter) -> &'static str {
    Counter::ALL.iter().find(|(other, _)| *other == counter).expect("ALL has every counter").1
}

/// An address as the programs see it.
pub fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn v4_offset(network: IpAddr, prefix: u32) -> u32 {
    if network.is_ipv4() { prefix + 96 } else { prefix }
}

fn bytes<T: Pod>(value: &T) -> &[u8] {
    // SAFETY: `Pod` types have no padding, so each of their bytes is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

fn read<T: Pod>(bytes: &[u8]) -> Result<T> {
    ensure!(bytes.len() == size_of::<T>(), "{} bytes instead of {}", bytes.len(), size_of::<T>());
    // SAFETY: the length was checked, and every bit pattern is a valid `Pod`.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

fn event(bytes: &[u8]) -> Result<Event> {
    ensure!(bytes.len() == size_of::<Event>(), "an event of {} bytes", bytes.len());
    let u32_at = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let u16_at = |at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
    Ok(Event {
        kind: u32_at(0),
        pod_id: u32_at(4),
        src: bytes[8..24].try_into()?,
        dst: bytes[24..40].try_into()?,
        src_port: u16_at(40),
        dst_port: u16_at(42),
        _pad: u32_at(44),
    })
}
