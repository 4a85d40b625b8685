//! A sniffer: counts what passes the interfaces of a namespace and looks for plaintext in it.

use std::{
    collections::BTreeMap,
    io::IoSliceMut,
    net::UdpSocket,
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use memchr::memmem::Finder;
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{ControlMessageOwned, LinkAddr, MsgFlags, recvmsg, setsockopt, sockopt},
};
use serde::Serialize;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::{namespace::Namespace, packet::Packet};

/// Port of the encrypted tunnel.
pub const TUNNEL_PORT: u16 = 15008;
/// Room for packets that the sniffing thread has not looked at yet, in bytes.
const BUFFER: usize = 256 << 20;
/// Longest packet: what segmentation offload makes.
const SNAP_LENGTH: usize = 1 << 16;
/// Different ports kept apart in a capture.
const MOST_PORTS: usize = 256;
/// Ethernet protocol "every protocol", `ETH_P_ALL`.
const EVERY_PROTOCOL: u16 = 0x0003;
/// Interface number of `lo`, the same in every namespace.
const LOOPBACK: usize = 1;

/// What to look for and where.
#[derive(Debug, Clone, Default)]
pub struct SnifferOptions {
    /// Byte strings that only occur in plaintext. Searched in every packet as a whole, so one that TCP has split is not
    /// found: use a control capture and send it more than once.
    pub markers: Vec<Vec<u8>>,
    /// Interfaces to listen on; none means every one but `lo`. A packet is counted on each interface that it passes.
    pub interfaces: Vec<String>,
}

impl SnifferOptions {
    /// Every interface, these markers.
    pub fn markers<const N: usize>(markers: [&str; N]) -> Self {
        Self { markers: markers.iter().map(|m| m.as_bytes().to_vec()).collect(), interfaces: Vec::new() }
    }

    /// Only this interface, e.g. the `wire` between the nodes: every packet is counted once.
    #[must_use]
    pub fn on(mut self, interface: &str) -> Self {
        self.interfaces.push(interface.to_owned());
        self
    }
}

/// What a sniffer saw.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Capture {
    /// Packets.
    pub packets: u64,
    /// Bytes of them, from the IP header on.
    pub bytes: u64,
    /// Packets that contain a marker or carry TCP payload outside the tunnel's port.
    pub plaintext_packets: u64,
    /// Packets that contain a marker.
    pub marker_hits: u64,
    /// Ports of the first packet with a marker, `source -> destination`.
    pub first_marker_hit: Option<String>,
    /// TCP packets with payload to or from the tunnel's port.
    pub tcp_15008_payload: u64,
    /// TCP packets with payload on every other port.
    pub plaintext_payload: u64,
    /// Of [`plaintext_payload`](Self::plaintext_payload), how many per port (the lower one of the two).
    pub plaintext_ports: BTreeMap<u16, u64>,
    /// Connection attempts per destination port.
    pub opened_ports: BTreeMap<u16, u64>,
    /// Payloads on the tunnel's port that begin with the header of a TLS handshake record.
    pub tls_handshake_records: u64,
    /// Payloads on the tunnel's port that begin with the header of a TLS application data record.
    pub tls_application_records: u64,
    /// UDP packets.
    pub udp_packets: u64,
    /// Packets that the kernel had no room for. A test that needs to have seen everything requires 0.
    pub dropped_by_kernel: u64,
}

/// A running sniffer.
pub struct Sniffer {
    namespace: Namespace,
    capture: Arc<Mutex<Capture>>,
    token: Vec<u8>,
    ended: Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Starts sniffing in `namespace`. Every packet after the return is seen.
    pub fn start(namespace: &Namespace, options: &SnifferOptions) -> Result<Self> {
        let (socket, interfaces) = namespace.enter(|| open(options))?.context("opening a packet socket")?;
        let capture = Arc::new(Mutex::new(Capture::default()));
        // Recognised on `lo`; random, so that no other sniffer or program says it by chance.
        let token = format!("end-of-capture-{:032x}", rand::random::<u128>()).into_bytes();
        let (send, ended) = channel();
        let worker = Worker {
            socket,
            interfaces,
            markers: options.markers.iter().map(|m| Finder::new(m).into_owned()).collect(),
            token: Finder::new(&token).into_owned(),
            capture: Arc::clone(&capture),
        };
        let thread = std::thread::spawn(move || {
            // The receiver is gone when the sniffer was dropped without being stopped.
            let _ = send.send(worker.run());
        });
        Ok(Self { namespace: namespace.clone(), capture, token, ended, thread: Some(thread) })
    }

    /// What was seen so far.
    pub fn so_far(&self) -> Capture {
        self.capture.lock().expect("nothing panics while holding it").clone()
    }

    /// Stops. Everything that passed before the call is counted.
    pub fn stop(mut self) -> Result<Capture> {
        self.finish()?;
        Ok(self.so_far())
    }

    /// Sends the end token through `lo` until the thread, working through the queue in order, has met it.
    fn finish(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        for _ in 0..150 {
            self.namespace
                .enter(|| UdpSocket::bind("127.0.0.1:0")?.send_to(&self.token, "127.0.0.1:9"))?
                .with_context(|| format!("ending the capture in {} over lo", self.namespace.name()))?;
            match self.ended.recv_timeout(Duration::from_millis(200)) {
                Ok(result) => {
                    let _ = thread.join();
                    return result;
                }
                Err(RecvTimeoutError::Timeout) => {} // its queue is long, or was too full for the token
                Err(RecvTimeoutError::Disconnected) => bail!("the sniffing thread panicked"),
            }
        }
        bail!("the sniffer in {} does not get to the end of its queue", self.namespace.name())
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            eprintln!("{error:#}");
        }
    }
}

/// Opens the packet socket of the namespace that the thread is in.
fn open(options: &SnifferOptions) -> Result<(Socket, Vec<usize>)> {
    let protocol = Protocol::from(i32::from(EVERY_PROTOCOL.to_be()));
    // DGRAM: the kernel takes the link header off.
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).context("setting the receive buffer")?;
    setsockopt(&socket, sockopt::RxqOvfl, &1).context("asking for the number of drops")?;
    let mut interfaces = Vec::new();
    for name in &options.interfaces {
        interfaces
            .push(if_nametoindex(name.as_str()).with_context(|| format!("looking for interface {name}"))? as usize);
    }
    if !interfaces.is_empty() {
        socket.attach_filter(&only(&interfaces))?;
    }
    Ok((socket, interfaces))
}

/// Classic BPF: accept packets of these interfaces and of `lo`.
fn only(interfaces: &[usize]) -> Vec<SockFilter> {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const INTERFACE: u32 = 0xffff_f008; // SKF_AD_OFF + SKF_AD_IFINDEX
    let mut program = vec![SockFilter::new(LOAD_WORD, 0, 0, INTERFACE)];
    for interface in interfaces.iter().chain([&LOOPBACK]) {
        program.push(SockFilter::new(JUMP_EQUAL, 0, 1, *interface as u32));
        program.push(SockFilter::new(RETURN, 0, 0, u32::MAX));
    }
    program.push(SockFilter::new(RETURN, 0, 0, 0));
    program
}

struct Worker {
    socket: Socket,
    interfaces: Vec<usize>,
    markers: Vec<Finder<'static>>,
    token: Finder<'static>,
    capture: Arc<Mutex<Capture>>,
}

impl Worker {
    fn run(self) -> Result<()> {
        let mut buffer = vec![0; SNAP_LENGTH];
        let mut control = nix::cmsg_space!(u32);
        loop {
            let (length, interface, drops) = {
                let mut parts = [IoSliceMut::new(&mut buffer)];
                let message =
                    recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())
                        .context("reading from the packet socket")?;
                let drops = message.cmsgs().context("reading control messages")?.find_map(|c| match c {
                    ControlMessageOwned::RxqOvfl(drops) => Some(drops),
                    _ => None,
                });
                (message.bytes, message.address.map_or(0, |address| address.ifindex()), drops)
            };
            ensure!(length <= buffer.len(), "a packet of {length} bytes");
            let packet = &buffer[..length];
            if interface == LOOPBACK {
                if self.token.find(packet).is_some() {
                    self.note_drops(drops);
                    return Ok(());
                }
                continue;
            }
            self.note_drops(drops);
            // The filter was attached after the socket was opened.
            if self.interfaces.is_empty() || self.interfaces.contains(&interface) {
                self.count(packet);
            }
        }
    }

    /// The kernel's count so far, given along with a packet once it is not 0.
    fn note_drops(&self, drops: Option<u32>) {
        if let Some(drops) = drops {
            self.capture.lock().expect("nothing panics while holding it").dropped_by_kernel = drops.into();
        }
    }

    fn count(&self, bytes: &[u8]) {
        let packet = Packet::parse(bytes);
        let marked = self.markers.iter().any(|marker| marker.find(bytes).is_some());
        let outside = match &packet {
            Packet::Tcp { source, destination, payload, .. } => {
                !payload.is_empty() && ![source, destination].contains(&&TUNNEL_PORT)
            }
            _ => false,
        };
        let mut capture = self.capture.lock().expect("nothing panics while holding it");
        capture.packets += 1;
        capture.plaintext_packets += u64::from(marked || outside);
        capture.bytes += bytes.len() as u64;
        if marked {
            capture.marker_hits += 1;
            if capture.first_marker_hit.is_none() {
                capture.first_marker_hit = Some(match &packet {
                    Packet::Tcp { source, destination, .. } => format!("tcp {source} -> {destination}"),
                    other => format!("{other:?}").chars().take(100).collect(),
                });
            }
        }
        match packet {
            Packet::Tcp { source, destination, opening, payload } => {
                if opening {
                    bump(&mut capture.opened_ports, destination);
                }
                if payload.is_empty() {
                    return;
                }
                if outside {
                    capture.plaintext_payload += 1;
                    bump(&mut capture.plaintext_ports, source.min(destination));
                } else {
                    capture.tcp_15008_payload += 1;
                    match payload {
                        [0x16, 0x03, ..] => capture.tls_handshake_records += 1,
                        [0x17, 0x03, 0x03, ..] => capture.tls_application_records += 1,
                        _ => {}
                    }
                }
            }
            Packet::Udp => capture.udp_packets += 1,
            Packet::Other => {}
        }
    }
}

/// Adds one to a port's count; ports beyond the limit share port 0.
fn bump(ports: &mut BTreeMap<u16, u64>, port: u16) {
    let key = if ports.contains_key(&port) || ports.len() < MOST_PORTS { port } else { 0 };
    *ports.entry(key).or_default() += 1;
}
