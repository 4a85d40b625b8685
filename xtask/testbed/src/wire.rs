//! A bad wire between the nodes: loss, duplicates, reordering, delay.
//!
//! Where the kernel has netem, netem does it. Elsewhere the wire is led through a third namespace, in which two threads of this process
//! carry every packet from one end to the other, or do not.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io::Read as _,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    process::Command,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use etherparse::{InternetSlice, SlicedPacket, TransportSlice};
use nix::{
    ifaddrs::getifaddrs,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, SockaddrLike, bind, setsockopt,
        sockopt::{RcvBufForce, SndBufForce},
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{Testbed, namespace::Namespace, node};

/// Ethernet protocol "every protocol", `ETH_P_ALL`.
const EVERY_PROTOCOL: u16 = 0x0003;
/// Longest packet; offloads are limited to one segment.
const LONGEST: usize = 1 << 16;
/// Packets in flight per direction; more are lost, as in any queue.
const QUEUE: usize = 4000;
/// What a socket of the wire keeps, until its thread gets to run and of what has not left yet, bytes of the kernel's memory each. With
/// the usual 208 KiB the kernel lost a tenth of what arrived, and in bursts all of it, whatever loss was asked for: handshakes took longer
/// than their ten seconds.
const ROOM: usize = 64 << 20;
/// Place of the checksum in TCP's header (RFC 9293, section 3.1).
const CHECKSUM: usize = 16;
/// Packets read before those that are due are sent.
const BATCH: usize = 64;

/// What happens to packets on the wire, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Impairment {
    /// Percentage lost.
    pub loss: f64,
    /// Percentage that arrives twice.
    pub duplicate: f64,
    /// Percentage that overtakes the others.
    pub reorder: f64,
    /// How long it takes, milliseconds.
    pub delay: u32,
    /// By how much that varies, either way, milliseconds.
    pub jitter: u32,
}

/// A wire while it is bad.
pub struct BadWire {
    how: How,
}

enum How {
    Netem(Vec<Namespace>),
    Carried {
        /// Closing it ends the threads.
        stop: Option<UnixStream>,
        threads: Vec<JoinHandle<Result<()>>>,
    },
}

impl Testbed {
    /// Makes the wire between the nodes bad, until the result is dropped. Connections made before break.
    pub fn impair(&self, impairment: Impairment, seed: u64) -> Result<BadWire> {
        let nodes = [self.node("a").namespace(), self.node("b").namespace()];
        if netem(nodes[0], impairment)? {
            ensure!(netem(nodes[1], impairment)?, "netem works on one node and not on the other");
            return Ok(BadWire { how: How::Netem(nodes.map(Clone::clone).into()) });
        }
        let middle = Namespace::create(&self.shared, format!("up-{}-wire", self.id()))?;
        node::lead_through(self.node("a"), self.node("b"), &middle)?;
        let ends = middle.enter(|| Ok::<_, anyhow::Error>([open("a")?, open("b")?]))?.context("opening the wire")?;
        let (stop, stopped) = UnixStream::pair().context("making a pair of sockets")?;
        let mut threads = Vec::new();
        for (from, to) in [(0, 1), (1, 0)] {
            let carrier = Carrier {
                from: ends[from].try_clone().context("duplicating a socket")?,
                to: ends[to].try_clone().context("duplicating a socket")?,
                stopped: stopped.try_clone().context("duplicating a socket")?,
                impairment,
                rng: StdRng::seed_from_u64(seed ^ from as u64),
                flying: BinaryHeap::new(),
                count: 0,
            };
            threads.push(std::thread::spawn(move || carrier.run()));
        }
        Ok(BadWire { how: How::Carried { stop: Some(stop), threads } })
    }
}

impl BadWire {
    /// Who makes it bad, for people.
    pub fn how(&self) -> &'static str {
        match self.how {
            How::Netem(_) => "netem",
            How::Carried { .. } => "packets carried by this process: the kernel has no netem",
        }
    }
}

impl Drop for BadWire {
    fn drop(&mut self) {
        match &mut self.how {
            How::Netem(nodes) => {
                for node in nodes {
                    if let Err(error) = tc(node, &["del", "dev", "wire", "root"]) {
                        eprintln!("{error:#}");
                    }
                }
            }
            How::Carried { stop, threads } => {
                *stop = None;
                for thread in threads.drain(..) {
                    match thread.join() {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => eprintln!("the wire: {error:#}"),
                        Err(_) => eprintln!("the wire: a thread panicked"),
                    }
                }
            }
        }
    }
}

/// Whether the kernel has netem; then it is at work.
fn netem(node: &Namespace, Impairment { loss, duplicate, reorder, delay, jitter }: Impairment) -> Result<bool> {
    let words = format!(
        "add dev wire root netem limit {QUEUE} delay {delay}ms {jitter}ms loss {loss}% duplicate {duplicate}% reorder {reorder}%"
    );
    match tc(node, &words.split(' ').collect::<Vec<_>>()) {
        Err(error) if format!("{error:#}").contains("qdisc kind is unknown") => Ok(false),
        result => result.map(|()| true),
    }
}

fn tc(node: &Namespace, words: &[&str]) -> Result<()> {
    let output = Command::new("tc").args(["-n", node.name(), "qdisc"]).args(words).output();
    let output = output.context("running `tc`; install iproute2")?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`tc -n {} qdisc {}` failed: {}", node.name(), words.join(" "), message.trim());
    Ok(())
}

/// A packet socket on one interface of the namespace that the thread is in.
fn open(interface: &str) -> Result<Socket> {
    let protocol = Protocol::from(i32::from(EVERY_PROTOCOL.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).context("opening a packet socket")?;
    let mut addresses = getifaddrs().context("listing interfaces")?;
    let address = addresses.find_map(|one| {
        let address = one.address.filter(|_| one.interface_name == interface)?;
        (address.family() == Some(AddressFamily::Packet)).then_some(address)
    });
    let address = address.with_context(|| format!("{interface} has no link address"))?;
    setsockopt(&socket, RcvBufForce, &ROOM).context("enlarging a packet socket's receive buffer")?;
    setsockopt(&socket, SndBufForce, &ROOM).context("enlarging a packet socket's send buffer")?;
    bind(socket.as_raw_fd(), &address).with_context(|| format!("binding to {interface}"))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// One direction of the wire.
struct Carrier {
    from: Socket,
    to: Socket,
    stopped: UnixStream,
    impairment: Impairment,
    rng: StdRng,
    /// When to deliver what. The number keeps the order of what is due at the same time.
    flying: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    count: u64,
}

impl Carrier {
    fn run(mut self) -> Result<()> {
        let mut buffer = vec![0; LONGEST];
        loop {
            let mut waited = [
                PollFd::new(self.from.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
            ];
            poll(&mut waited, self.patience()).context("waiting for packets")?;
            if waited[1].any().unwrap_or(true) {
                return Ok(());
            }
            for _ in 0..BATCH {
                let Ok(length) = (&self.from).read(&mut buffer) else { break };
                self.take(&buffer[..length]);
            }
            self.deliver();
        }
    }

    fn patience(&self) -> PollTimeout {
        let Some(Reverse((due, ..))) = self.flying.peek() else { return PollTimeout::NONE };
        let wait = due.saturating_duration_since(Instant::now());
        PollTimeout::try_from(wait + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
    }

    fn take(&mut self, packet: &[u8]) {
        let Impairment { loss, duplicate, reorder, delay, jitter } = self.impairment;
        let mut chance = |percent: f64| self.rng.random_bool(percent / 100.0);
        let (lost, twice, first) = (chance(loss), chance(duplicate), chance(reorder));
        for _ in 0..if lost { 0 } else { 1 + u8::from(twice) } {
            if self.flying.len() < QUEUE {
                let millis = self.rng.random_range(delay.saturating_sub(jitter)..=delay + jitter);
                let due = Instant::now() + Duration::from_millis(if first { 0 } else { millis.into() });
                self.count += 1;
                self.flying.push(Reverse((due, self.count, with_checksum(packet))));
            }
        }
    }

    fn deliver(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((due, ..))) = self.flying.peek()
            && *due <= now
        {
            let Some(Reverse((_, _, packet))) = self.flying.pop() else { return };
            // A full queue or an interface that goes is one more loss.
            let _ = self.to.send(&packet);
        }
    }
}

/// The kernel leaves TCP's checksum to a network card. There is none, so it is made here.
fn with_checksum(packet: &[u8]) -> Vec<u8> {
    let mut done = packet.to_vec();
    if let Some((place, checksum)) = checksum(packet)
        && let Some(field) = done.get_mut(place..place + 2)
    {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
    done
}

/// Where TCP's checksum is in an Ethernet packet without padding, and what it has to be.
fn checksum(packet: &[u8]) -> Option<(usize, u16)> {
    let sliced = SlicedPacket::from_ethernet(packet).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { return None };
    let checksum = match sliced.net? {
        InternetSlice::Ipv4(ip) => tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()),
        InternetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()),
        InternetSlice::Arp(_) => return None,
    };
    Some((packet.len() - tcp.slice().len() + CHECKSUM, checksum.ok()?))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::with_checksum;

    #[test]
    fn checksums_of_both_families_are_made() {
        let builders = vec![
            PacketBuilder::ethernet2([1; 6], [2; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64),
            PacketBuilder::ethernet2([1; 6], [2; 6]).ipv6([1; 16], [2; 16], 64),
        ];
        for builder in builders {
            let mut right = Vec::new();
            builder.tcp(40_000, 15_008, 7, 1000).write(&mut right, b"some payload").unwrap();
            let mut wrong = right.clone();
            let place = right.len() - b"some payload".len() - 20 + super::CHECKSUM;
            wrong[place] ^= 0x55;
            assert_eq!(with_checksum(&wrong), right);
        }
        assert_eq!(with_checksum(b"no packet"), b"no packet");
    }
}
