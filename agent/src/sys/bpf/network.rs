//! Links of network interfaces (tcx, netkit): made by the interface's index, since names move; and
//! which links an interface has.

use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd as _, OwnedFd},
};

use super::{bpf, raw};

const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_F_BEFORE: u32 = 1 << 3;

/// `BPF_MPROG_MAX` of the kernel: most programs on one hook of an interface.
const MOST_PROGRAMS: usize = 64;

/// Where a program runs on an interface: `enum bpf_attach_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Hook {
    /// `BPF_TCX_INGRESS` (Linux 6.6).
    TcxIngress = 46,
    /// `BPF_TCX_EGRESS` (Linux 6.6).
    TcxEgress = 47,
    /// `BPF_NETKIT_PEER` (Linux 6.7): what the other end of a netkit pair sends, attached to the
    /// primary end.
    NetkitPeer = 55,
}

#[repr(C)]
struct LinkCreate {
    program_fd: u32,
    interface: u32,
    hook: u32,
    flags: u32,
    relative_fd: u32,
    _pad: u32,
    expected_revision: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgQuery {
    interface: u32,
    hook: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    _pad: u32,
    program_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Attaches `program` to an interface of the calling thread's network namespace, before every other
/// program there: one before it could accept a packet for good. `EEXIST` when the program is on
/// this hook already.
pub fn link_create_first(program: BorrowedFd<'_>, interface: u32, hook: Hook) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        program_fd: raw(program),
        interface,
        hook: hook as u32,
        flags: BPF_F_BEFORE,
        relative_fd: 0,
        _pad: 0,
        expected_revision: 0,
    };
    // SAFETY: `attr` is BPF_LINK_CREATE's layout for tcx and netkit, and holds no pointer.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &mut attr) }?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just returned this descriptor (with O_CLOEXEC), nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Numbers of the links on an interface of the calling thread's network namespace, in the order in
/// which they run; 0 for a program that was attached without a link.
pub fn links_on(interface: u32, hook: Hook) -> io::Result<Vec<u32>> {
    let (mut programs, mut links) = ([0u32; MOST_PROGRAMS], [0u32; MOST_PROGRAMS]);
    let mut attr = ProgQuery {
        interface,
        hook: hook as u32,
        program_ids: programs.as_mut_ptr() as u64,
        count: MOST_PROGRAMS as u32,
        link_ids: links.as_mut_ptr() as u64,
        ..ProgQuery::default()
    };
    // SAFETY: `attr` is BPF_PROG_QUERY's layout; the kernel writes at most `count` numbers to each
    // array, and both outlive the call.
    match unsafe { bpf(BPF_PROG_QUERY, &mut attr) } {
        // The first kernels with tcx say so where nothing is attached.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map(drop)?,
    }
    Ok(links[..(attr.count as usize).min(MOST_PROGRAMS)].to_vec())
}
