//! Loads and attaches a two-instruction program, to learn what the kernel accepts.
//!
//! aya's feature probes know program types but not attach types, and its loader wants an ELF file.

use std::{
    io,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{TcpTlsTx, TlsCryptoInfo},
};

use super::tls;

/// `bpf(2)` commands, from `linux/bpf.h`.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_LINK_CREATE: libc::c_int = 28;
/// `BPF_MAP_TYPE_SOCKMAP` of `enum bpf_map_type`.
const SOCKMAP: u32 = 15;

/// `enum bpf_prog_type` of `linux/bpf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ProgramKind {
    /// tc.
    SchedCls = 3,
    /// TCP events of a cgroup.
    SockOps = 13,
    /// connect, getpeername, getsockname of a cgroup.
    CgroupSockAddr = 18,
}

/// `enum bpf_attach_type` of `linux/bpf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // the kernel's names
pub enum AttachKind {
    SockOps = 3,
    Inet4Connect = 10,
    Inet6Connect = 11,
    Inet4GetPeerName = 29,
    Inet6GetPeerName = 30,
    Inet4GetSockName = 31,
    Inet6GetSockName = 32,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// A cgroup v2 directory.
    Cgroup(BorrowedFd<'a>),
    /// An interface of the calling thread's network namespace.
    Interface(u32),
}

/// `struct bpf_insn`.
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// `return 1`: "go on" for every cgroup hook.
static RETURN_1: [Instruction; 2] = [
    Instruction { code: 0xb7, registers: 0, offset: 0, immediate: 1 }, // BPF_ALU64 | BPF_MOV | BPF_K, r0
    Instruction { code: 0x95, registers: 0, offset: 0, immediate: 0 }, // BPF_JMP | BPF_EXIT
];

/// The start of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes what is not given as zero.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The start of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// Loads the program; it goes away with the descriptor.
pub fn load(kind: ProgramKind, attach: AttachKind) -> io::Result<OwnedFd> {
    let mut attr = ProgLoad {
        prog_type: kind as u32,
        insn_cnt: RETURN_1.len() as u32,
        insns: RETURN_1.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        expected_attach_type: attach as u32,
        ..ProgLoad::default()
    };
    // tcx programs are attached by link and carry no expected type; sockops neither.
    if kind != ProgramKind::CgroupSockAddr {
        attr.expected_attach_type = 0;
    }
    bpf(BPF_PROG_LOAD, &attr)
}

/// Attaches it with a link; it is detached when the descriptor is closed.
pub fn attach(program: impl AsFd, target: Target<'_>, attach: AttachKind) -> io::Result<OwnedFd> {
    let target = match target {
        Target::Cgroup(fd) => fd.as_raw_fd().cast_unsigned(),
        Target::Interface(index) => index,
    };
    let prog_fd = program.as_fd().as_raw_fd().cast_unsigned();
    bpf(BPF_LINK_CREATE, &LinkCreate { prog_fd, target, attach_type: attach as u32, flags: 0 })
}

/// The start of `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// `union bpf_attr` for `BPF_MAP_UPDATE_ELEM`.
#[repr(C)]
struct MapUpdate {
    map: u64,
    key: u64,
    value: u64,
    flags: u64,
}

/// What a kernel says to a kernel TLS socket in a sockmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SockmapRule {
    /// No, either way round.
    Refused,
    /// Yes, one way or the other. Such kernels leak plaintext or crash once something is redirected.
    Allowed,
}

/// Tries the forbidden combination on sockets of its own, in both orders. Nothing is ever sent, and no program is attached to the map.
pub fn ktls_in_sockmap() -> io::Result<SockmapRule> {
    let map = bpf(BPF_MAP_CREATE, &MapCreate { map_type: SOCKMAP, key_size: 4, value_size: 4, max_entries: 1 })?;
    let put = |socket: &TcpStream| -> io::Result<()> {
        let (key, value) = (0_u32, socket.as_raw_fd());
        let update = MapUpdate {
            map: map.as_raw_fd().cast_unsigned().into(),
            key: std::ptr::from_ref(&key) as u64,
            value: std::ptr::from_ref(&value) as u64,
            flags: 0,
        };
        bpf_call(BPF_MAP_UPDATE_ELEM, &update).map(drop)
    };
    let keys = |socket: &TcpStream| setsockopt(socket, TcpTlsTx, &no_keys()).map_err(io::Error::from);
    let map_last = {
        let (socket, _peer) = connected()?;
        tls::install(socket.as_fd())?;
        keys(&socket)?;
        put(&socket)
    };
    let map_first = {
        let (socket, _peer) = connected()?;
        put(&socket)?;
        tls::install(socket.as_fd()).and_then(|()| keys(&socket))
    };
    Ok(if map_last.is_ok() || map_first.is_ok() { SockmapRule::Allowed } else { SockmapRule::Refused })
}

fn connected() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let socket = TcpStream::connect(listener.local_addr()?)?;
    Ok((socket, listener.accept()?.0))
}

fn no_keys() -> TlsCryptoInfo {
    TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
        info: libc::tls_crypto_info { version: libc::TLS_1_3_VERSION, cipher_type: libc::TLS_CIPHER_AES_GCM_128 },
        iv: [0; 8],
        key: [0; 16],
        salt: [0; 4],
        rec_seq: [0; 8],
    })
}

/// Only for commands that answer with a new descriptor.
fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    let fd = bpf_call(command, attr)?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf_call<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_int> {
    // SAFETY: `attr` is `repr(C)`, has no padding (all structs: only 4-byte fields before naturally aligned 8-byte
    // ones), lives for the call, and its size is passed along; the pointers inside point to statics, or to locals that outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    let result = i32::try_from(result).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

const _: () = assert!(size_of::<ProgLoad>() == 72 && size_of::<LinkCreate>() == 16 && size_of::<Instruction>() == 8);
