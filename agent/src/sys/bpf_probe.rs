//! Loads and attaches a two-instruction program, to learn what the kernel accepts.
//!
//! aya's feature probes know program types but not attach types, and its loader wants an ELF file.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

/// `bpf(2)` commands, from `linux/bpf.h`.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;

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

/// Only for the two commands above: both answer with a new descriptor.
fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is `repr(C)`, has no padding (both structs: only 4-byte fields before naturally aligned 8-byte
    // ones), lives for the call, and its size is passed along; the pointers inside point to statics.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    let fd = i32::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

const _: () = assert!(size_of::<ProgLoad>() == 72 && size_of::<LinkCreate>() == 16 && size_of::<Instruction>() == 8);
