//! Refused packets are answered with a reset that their sender's kernel believes.

use std::{
    fs::OpenOptions,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    os::unix::fs::OpenOptionsExt as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bpf_tests::{
    namespace::{Namespace, eventually},
    object::{Direction::Inbound, Loaded, Verdict},
    packet::{ACK, Extension, Link, Packet, RST, SYN},
};
use libbpf_rs::TC_INGRESS;
use nix::{errno::Errno, libc};
use underpass_abi::{Counter::InboundStrictDropped, POD_SILENT, POD_STRICT, programs};

/// Longer than a reset takes on a loaded machine, shorter than a lost SYN.
const AT_ONCE: Duration = Duration::from_millis(900);

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and port in a test")
}

fn strict(flags: u32) -> Result<Loaded> {
    let loaded = Loaded::new()?;
    loaded.pod_by_id(POD_STRICT | flags)?;
    Ok(loaded)
}

/// A one's complement sum of 16-bit words.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What a reset says, once its lengths and checksums are right.
#[derive(Debug, PartialEq, Eq)]
struct Reset {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
}

/// Reads a packet behind its link header.
fn reset(packet: &[u8]) -> Reset {
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("4 bytes"));
    let (src, dst, tcp, pseudo): (IpAddr, IpAddr, &[u8], Vec<u8>) = if packet[0] >> 4 == 4 {
        let (header, tcp) = packet.split_at(20);
        assert_eq!(sum(header), 0xffff, "checksum of the IPv4 header");
        assert_eq!((header[0], &header[2..4], header[8], header[9]), (0x45, &[0, 40][..], 64, 6));
        let address = |bytes: &[u8]| IpAddr::from(<[u8; 4]>::try_from(bytes).expect("4 bytes"));
        let pseudo = [&header[12..20], &[0, 6, 0, 20]].concat();
        (address(&header[12..16]), address(&header[16..20]), tcp, pseudo)
    } else {
        let (header, tcp) = packet.split_at(40);
        assert_eq!((header[0] >> 4, &header[4..8]), (6, &[0, 20, 6, 64][..]));
        let address = |bytes: &[u8]| IpAddr::from(<[u8; 16]>::try_from(bytes).expect("16 bytes"));
        let pseudo = [&header[8..40], &[0, 0, 0, 20, 0, 0, 0, 6]].concat();
        (address(&header[8..24]), address(&header[24..40]), tcp, pseudo)
    };
    assert_eq!((tcp.len(), tcp[12]), (20, 5 << 4), "a TCP header without options or data");
    assert_eq!(sum(&[&pseudo[..], tcp].concat()), 0xffff, "checksum of TCP");
    let port = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
    Reset {
        from: SocketAddr::new(src, port(0)),
        to: SocketAddr::new(dst, port(2)),
        sequence: number(&tcp[4..8]),
        acknowledgement: number(&tcp[8..12]),
        flags: tcp[13],
    }
}

/// With the address of the interface of `BPF_PROG_TEST_RUN`, and with numbers in the TCP header.
fn addressed(packet: &Packet, link: Link) -> Vec<u8> {
    let mut bytes = packet.bytes(link);
    bytes[..6].fill(0);
    let tcp = bytes.len() - 20;
    bytes[tcp + 4..tcp + 8].copy_from_slice(&0xffff_ffff_u32.to_be_bytes());
    bytes[tcp + 8..tcp + 12].copy_from_slice(&0x0102_0304_u32.to_be_bytes());
    bytes
}

const ENDS: [(&str, &str); 2] = [("10.9.0.2:40000", "10.9.0.1:80"), ("[fd09::2]:40000", "[fd09::1]:80")];

#[test]
fn refused_packets_are_turned_around() -> Result<()> {
    let loaded = strict(0)?;
    for (client, pod) in ENDS.map(|(client, pod)| (at(client), at(pod))) {
        for (flags, sequence, acknowledgement, answer) in
            [(SYN, 0, 0, RST | ACK), (ACK, 0x0102_0304, 0, RST), (SYN | ACK, 0x0102_0304, 0, RST)]
        {
            let packet = addressed(&Packet::tcp(client, pod, flags), Link::Ethernet);
            let (verdict, after) = loaded.turned(Inbound, Link::Ethernet, &packet)?;
            assert_eq!(verdict, Verdict::Redirect, "{client}, flags {flags}");
            let expected = Reset { from: pod, to: client, sequence, acknowledgement, flags: answer };
            assert_eq!(reset(&after[Link::Ethernet.len()..]), expected);
            assert_eq!([&after[..6], &after[6..12]], [&packet[6..12], &packet[..6]], "link-layer addresses");
            assert_eq!(after[12..14], packet[12..14], "type");
        }
    }
    Ok(())
}

#[test]
fn some_packets_are_never_answered() -> Result<()> {
    use Extension::{Destination, Fragment};
    let (loaded, silent, released) = (strict(0)?, strict(POD_SILENT)?, Loaded::new()?);
    let drops = |loaded: &Loaded, case: &str, bytes: &[u8]| -> Result<()> {
        let verdict = loaded.run(Inbound, Link::Ethernet, bytes)?;
        assert_eq!(verdict, Verdict::Drop, "{case}");
        Ok(())
    };
    for (client, pod) in ENDS.map(|(client, pod)| (at(client), at(pod))) {
        let syn = Packet::tcp(client, pod, SYN);
        let bytes = |packet: &Packet| addressed(packet, Link::Ethernet);
        drops(&silent, "where that is not wanted", &bytes(&syn))?;
        // Links of a pod that leaves the mesh go a moment after what is known of the pod. A SYN
        // that is dropped comes again.
        drops(&released, "nothing is known of the pod", &bytes(&syn))?;
        for flags in [RST, RST | ACK, SYN | RST, 0, 0x01] {
            drops(&loaded, &format!("flags {flags}"), &bytes(&Packet::tcp(client, pod, flags)))?;
        }
        let mut to_all = bytes(&syn);
        to_all[..6].fill(0xff);
        drops(&loaded, "a link-layer broadcast", &to_all)?;
        // The kernel takes the first tag off before the program runs; these have one more.
        for link in [Link::Vlan, Link::DoubleVlan] {
            let verdict = loaded.run(Inbound, link, &addressed(&syn, link))?;
            assert_eq!(verdict, Verdict::Drop, "{link:?}");
        }
        drops(&loaded, "a piece of a header", &bytes(&syn.clone().fragment(1, false)))?;
        if client.is_ipv4() {
            drops(&loaded, "IPv4 options", &bytes(&syn.options(8)))?;
            for nobody in ["224.0.0.1:9", "255.255.255.255:9", "0.0.0.0:9", "127.0.0.1:9"] {
                drops(&loaded, nobody, &bytes(&Packet::tcp(at(nobody), pod, SYN)))?;
            }
        } else {
            drops(&loaded, "extension headers", &bytes(&syn.clone().extensions(&[Destination(8)])))?;
            drops(&loaded, "a fragment header", &bytes(&syn.extensions(&[Fragment(0, false)])))?;
            for nobody in ["[ff02::1]:9", "[::]:9", "[::1]:9"] {
                drops(&loaded, nobody, &bytes(&Packet::tcp(at(nobody), pod, SYN)))?;
            }
        }
    }
    Ok(())
}

/// `struct ifreq` as `SIOCETHTOOL` reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    data: *mut Value,
    _rest: [u8; 16],
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Has the interface of the current namespace leave checksums to the device, or not.
fn offload_checksums(interface: &str, on: bool) -> Result<()> {
    const SIOCETHTOOL: libc::Ioctl = 0x8946;
    const ETHTOOL_STXCSUM: u32 = 0x17;
    let mut value = Value { command: ETHTOOL_STXCSUM, data: u32::from(on) };
    let mut request = Request { name: [0; 16], data: &raw mut value, _rest: [0; 16] };
    request.name[..interface.len()].copy_from_slice(interface.as_bytes());
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    // SAFETY: the request has ifreq's layout, and what it points to is an ethtool_value that
    // outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    Errno::result(result).with_context(|| format!("checksum offload of {interface}"))?;
    Ok(())
}

/// Whoever has made the checksum of the SYN, and whoever makes that of the reset.
#[test]
fn clients_are_refused_at_once() -> Result<()> {
    for (client_offloads, pod_offloads) in [(true, true), (true, false), (false, true), (false, false)] {
        let (pod, outside) = (Namespace::new()?, Namespace::new()?);
        pod.connect(&outside)?;
        outside.enter(|| offload_checksums("eth0", client_offloads))??;
        pod.enter(|| -> Result<()> {
            offload_checksums("eth0", pod_offloads)?;
            let loaded = strict(0)?;
            loaded.attach_tc(programs::INBOUND, "eth0", TC_INGRESS)?;
            for host in ["10.9.0.1", "fd09::1"] {
                let host: IpAddr = host.parse()?;
                let application = TcpListener::bind((host, 80))?;
                let case = format!("{host}, offload: client {client_offloads}, pod {pod_offloads}");
                let begun = Instant::now();
                let refused = outside.enter(|| TcpStream::connect((host, 80)))?;
                let error = refused.err().with_context(|| format!("{case}: connected"))?;
                ensure!(error.raw_os_error() == Some(Errno::ECONNREFUSED as i32), "{case}: {error}");
                ensure!(begun.elapsed() < AT_ONCE, "{case}: after {:?}", begun.elapsed());
                drop(application);
            }
            assert_eq!(loaded.counter(InboundStrictDropped)?, 2);
            Ok(())
        })??;
    }
    Ok(())
}

/// A connection that was open when its port became STRICT, and whose end in the pod is gone.
#[test]
fn data_without_a_connection_is_answered() -> Result<()> {
    let (pod, outside) = (Namespace::new()?, Namespace::new()?);
    pod.connect(&outside)?;
    pod.enter(|| -> Result<()> {
        let loaded = Loaded::new()?;
        loaded.pod_by_id(0)?;
        loaded.attach_tc(programs::INBOUND, "eth0", TC_INGRESS)?;
        for host in ["10.9.0.1", "fd09::1"] {
            let listener = TcpListener::bind((host, 80))?;
            let mut client = outside.enter(|| TcpStream::connect((host, 80)))??;
            let (server, _) = listener.accept()?;
            // Gone without a word to the client, as when a namespace's state is lost.
            let repaired = socket2::SockRef::from(&server);
            repair(&repaired)?;
            drop(server);
            loaded.pod_by_id(POD_STRICT)?;
            client.write_all(&[0; 9000])?;
            client.set_read_timeout(Some(AT_ONCE))?;
            let error = client.read(&mut [0]).err().context("the connection goes on")?;
            ensure!(error.raw_os_error() == Some(Errno::ECONNRESET as i32), "{host}: {error}");
            loaded.pod_by_id(0)?;
        }
        Ok(())
    })?
}

/// In repair mode a socket is closed without a packet.
fn repair(socket: &socket2::SockRef<'_>) -> Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one integer.
    let result = unsafe {
        let (value, length) = ((&raw const on).cast(), size_of_val(&on) as libc::socklen_t);
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, value, length)
    };
    Errno::result(result).context("TCP_REPAIR")?;
    Ok(())
}

/// An interface without a link layer, as of some networks.
#[test]
fn packets_without_a_link_layer_are_answered() -> Result<()> {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    const IFF_TUN_NO_PI: u16 = 0x1001;
    Namespace::new()?.enter(|| -> Result<()> {
        let mut tun = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("opening /dev/net/tun")?;
        let mut request = [0u8; 40];
        request[..4].copy_from_slice(b"tun0");
        request[16..18].copy_from_slice(&IFF_TUN_NO_PI.to_ne_bytes());
        // SAFETY: the request is as large as an ifreq.
        let result = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
        Errno::result(result).context("making tun0")?;
        let ip = |arguments: &str| -> Result<()> {
            let status = std::process::Command::new("ip").args(arguments.split_whitespace()).status()?;
            ensure!(status.success(), "ip {arguments}");
            Ok(())
        };
        ip("addr add 10.9.0.1/24 dev tun0")?;
        ip("addr add fd09::1/64 dev tun0 nodad")?;
        ip("link set tun0 up")?;
        let loaded = strict(0)?;
        loaded.attach_tc(programs::INBOUND_L3, "tun0", TC_INGRESS)?;
        for (client, pod) in ENDS.map(|(client, pod)| (at(client), at(pod))) {
            let mut syn = Packet::tcp(client, pod, SYN).bytes(Link::None);
            let tcp = syn.len() - 20;
            syn[tcp + 4..tcp + 8].copy_from_slice(&9u32.to_be_bytes());
            tun.write_all(&syn)?;
            let mut answer = None;
            eventually("a reset on tun0", || {
                let mut packet = [0; 2048];
                // What the interface says of its own, such as router solicitations, is passed over.
                let length = match tun.read(&mut packet) {
                    Ok(length) => length,
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
                    Err(e) => return Err(e.into()),
                };
                let protocol = if packet[0] >> 4 == 4 { packet[9] } else { packet[6] };
                answer = (protocol == 6).then(|| packet[..length].to_vec());
                Ok(answer.is_some())
            })?;
            let expected = Reset { from: pod, to: client, sequence: 0, acknowledgement: 10, flags: RST | ACK };
            assert_eq!(answer.as_deref().map(reset), Some(expected));
        }
        Ok(())
    })?
}
