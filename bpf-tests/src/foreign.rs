//! Programs that are not ours, on hooks that are ours too: they count how often they run and let
//! everything go on, or accept it.
//!
//! They are five instructions, loaded with libbpf's raw calls, because what another vendor's loader
//! does is the point.

use std::{
    ffi::c_void,
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::Path,
    ptr,
};

use anyhow::{Context as _, Result};
use libbpf_rs::libbpf_sys as sys;

/// `TC_ACT_UNSPEC`: the next program decides.
const NEXT: i32 = -1;
/// `TC_ACT_OK`: accepted, no further program is asked.
const ACCEPT: i32 = 0;
/// Of cgroup hooks: go on.
const GO_ON: i32 = 1;
/// `BPF_PSEUDO_MAP_VALUE`: the immediate is a map's descriptor and becomes the address of its value.
const MAP_VALUE: u8 = 2;

/// A loaded program and its counter.
pub struct Foreign {
    program: OwnedFd,
    counter: OwnedFd,
    /// Attached as long as this lives.
    link: Option<OwnedFd>,
}

impl Foreign {
    /// On `connect()` of IPv4 sockets of the processes below a cgroup.
    pub fn connect4(cgroup: &Path) -> Result<Self> {
        let mut this = Self::load(sys::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, Some(sys::BPF_CGROUP_INET4_CONNECT), GO_ON)?;
        let cgroup = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        this.attach(cgroup.as_raw_fd(), sys::BPF_CGROUP_INET4_CONNECT).context("attaching to connect4")?;
        Ok(this)
    }

    /// On what arrives at an interface of the calling thread's network namespace, by tcx. `None` before Linux 6.6.
    pub fn tcx_ingress(interface: u32) -> Result<Option<Self>> {
        let mut this = Self::load(sys::BPF_PROG_TYPE_SCHED_CLS, None, NEXT)?;
        match this.attach(interface.cast_signed(), sys::BPF_TCX_INGRESS) {
            Ok(()) => Ok(Some(this)),
            Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok(None),
            Err(error) => Err(error).context("attaching by tcx"),
        }
    }

    /// For `tc filter add … bpf direct-action object-pinned PATH`; not attached yet.
    pub fn pinned_classifier(path: &Path) -> Result<Self> {
        Self::pinned(path, NEXT)
    }

    /// The same, of a program that accepts every packet for good, as a network plugin's does when
    /// it sends packets on itself.
    pub fn pinned_acceptor(path: &Path) -> Result<Self> {
        Self::pinned(path, ACCEPT)
    }

    fn pinned(path: &Path, verdict: i32) -> Result<Self> {
        let this = Self::load(sys::BPF_PROG_TYPE_SCHED_CLS, None, verdict)?;
        let text = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
        // SAFETY: the descriptor is ours and the string ends with a zero; both live for the call.
        let result = unsafe { sys::bpf_obj_pin(this.program.as_raw_fd(), text.as_ptr()) };
        check(result).with_context(|| format!("pinning at {}", path.display()))?;
        Ok(this)
    }

    /// How often it has run.
    pub fn runs(&self) -> Result<u64> {
        let (key, mut value) = (0_u32, 0_u64);
        // SAFETY: key and value have the sizes that the map was made with, and live for the call.
        let result = unsafe {
            sys::bpf_map_lookup_elem(
                self.counter.as_raw_fd(),
                ptr::from_ref(&key).cast::<c_void>(),
                ptr::from_mut(&mut value).cast::<c_void>(),
            )
        };
        check(result).context("reading the counter")?;
        Ok(value)
    }

    fn load(kind: sys::bpf_prog_type, attach: Option<sys::bpf_attach_type>, verdict: i32) -> Result<Self> {
        // SAFETY: a name that ends with a zero, and no options.
        let counter = unsafe {
            sys::bpf_map_create(
                sys::BPF_MAP_TYPE_ARRAY,
                c"foreign".as_ptr(),
                size_of::<u32>() as u32,
                size_of::<u64>() as u32,
                1,
                ptr::null(),
            )
        };
        let counter = descriptor(counter).context("creating the counter")?;
        let code = [
            // r1 = address of the counter (two slots), r2 = 1, lock *r1 += r2, r0 = verdict, return
            instruction(0x18, 1, MAP_VALUE, counter.as_raw_fd()),
            instruction(0, 0, 0, 0),
            instruction(0xb7, 2, 0, 1),
            instruction(0xdb, 1, 2, 0),
            instruction(0xb7, 0, 0, verdict),
            instruction(0x95, 0, 0, 0),
        ];
        let mut options = sys::bpf_prog_load_opts {
            sz: size_of::<sys::bpf_prog_load_opts>() as sys::size_t,
            expected_attach_type: attach.unwrap_or_default(),
            ..Default::default()
        };
        // SAFETY: names end with a zero, `code` and `options` live for the call and their sizes are true.
        let program = unsafe {
            sys::bpf_prog_load(
                kind,
                c"foreign".as_ptr(),
                c"GPL".as_ptr(),
                code.as_ptr(),
                code.len() as sys::size_t,
                &raw mut options,
            )
        };
        Ok(Self { program: descriptor(program).context("loading")?, counter, link: None })
    }

    fn attach(&mut self, target: i32, kind: sys::bpf_attach_type) -> io::Result<()> {
        // SAFETY: a descriptor of ours, a target that the kernel checks, and no options.
        let link = unsafe { sys::bpf_link_create(self.program.as_raw_fd(), target, kind, ptr::null()) };
        self.link = Some(descriptor(link)?);
        Ok(())
    }
}

/// `struct bpf_insn`, whose registers are four bits each.
fn instruction(code: u8, destination: u8, source: u8, immediate: i32) -> sys::bpf_insn {
    let mut all = sys::bpf_insn { code, off: 0, imm: immediate, ..Default::default() };
    all.set_dst_reg(destination);
    all.set_src_reg(source);
    all
}

/// libbpf's low-level calls return the negated error.
fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}

fn descriptor(result: i32) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the kernel has just returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
