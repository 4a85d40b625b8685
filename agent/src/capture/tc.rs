//! The tc programs of a pod: guard and inbound program on its interfaces. Interfaces are looked up by name, so attaching
//! happens inside the pod's namespace.

use std::{collections::BTreeMap, io, os::fd::AsFd as _, sync::Arc};

use aya::{
    Ebpf,
    programs::{
        ProgramError, SchedClassifier, TcAttachType,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
    },
    util::KernelVersion,
};
use nix::net::if_::if_nametoindex;
use underpass_abi::programs::{GUARD, GUARD_L3, INBOUND, INBOUND_L3, NODE_GUARD};

use super::{
    CaptureError, TcMode,
    interfaces::{self, Interface},
    links::{self, Failure},
    loader::Objects,
    maps::chain,
    netns::Netns,
    pins::{self, Direction, Layout, TcPin},
};
use crate::sys::bpf::Hook;

/// clsact filters of ours come first and have a handle that is not the kernel's first choice, so that a restarted agent
/// finds them.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x5550);

/// How programs attach on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// tcx links, pinned.
    Tcx,
    /// Filters of a clsact qdisc.
    Clsact,
}

impl Method {
    /// The method for `mode`.
    pub fn choose(mode: TcMode) -> Result<Self, CaptureError> {
        let tcx = KernelVersion::current().is_ok_and(|v| v.code() >= KernelVersion::new(6, 6, 0).code());
        match mode {
            TcMode::Auto | TcMode::Tcx if tcx => Ok(Self::Tcx),
            TcMode::Auto | TcMode::Clsact => Ok(Self::Clsact),
            TcMode::Tcx => Err(CaptureError::Bpf {
                action: "attach tc programs as tcx links".to_owned(),
                reason: "this kernel is older than 6.6; use clsact".to_owned(),
            }),
        }
    }
}

/// What runs where on one kind of interface.
fn programs_for(interface: &Interface) -> [(&'static str, Direction); 2] {
    // Inbound first: an interface that is half done lets out what it let out before, and lets in less.
    if interface.link_header {
        [(INBOUND, Direction::Ingress), (GUARD, Direction::Egress)]
    } else {
        [(INBOUND_L3, Direction::Ingress), (GUARD_L3, Direction::Egress)]
    }
}

/// Programs of a pod by their names. Another interface is guarded by them at once: loading them again would take the time in which
/// packets pass it.
#[derive(Debug, Default)]
pub struct Programs(BTreeMap<&'static str, SchedClassifier>);

impl Programs {
    /// Are all programs that these interfaces need loaded?
    pub fn cover(&self, interfaces: &[Interface]) -> bool {
        interfaces.iter().flat_map(programs_for).all(|(name, _)| self.0.contains_key(name))
    }
}

/// Loads these programs for a pod. Blocks.
fn load(
    objects: &Objects,
    pod_id: u32,
    names: &[&'static str],
) -> Result<BTreeMap<&'static str, SchedClassifier>, CaptureError> {
    let mut bpf = objects.load_for_pod(pod_id, names)?;
    let programs: Result<_, String> = names.iter().map(|name| Ok((*name, take_program(&mut bpf, name)?))).collect();
    programs.map_err(|reason| CaptureError::Bpf { action: format!("take the programs of pod {pod_id}"), reason })
}

/// A loaded program on its own.
pub fn take_program(bpf: &mut Ebpf, name: &'static str) -> Result<SchedClassifier, String> {
    let program: &mut SchedClassifier = bpf
        .program_mut(name)
        .ok_or_else(|| "no such program".to_owned())?
        .try_into()
        .map_err(|e: ProgramError| chain(&e))?;
    let info = program.info().map_err(|e| chain(&e))?;
    SchedClassifier::from_program_info(info, name.into()).map_err(|e| chain(&e))
}

/// Attaches to these interfaces, replacing in place what an earlier agent attached. On error, what was newly attached
/// stays: the caller detaches the pod or tries again. `programs` are those of the pod that are loaded; what is missing is added.
pub async fn attach(
    objects: &Arc<Objects>,
    netns: &Netns,
    method: Method,
    pod_id: u32,
    interfaces: Vec<Interface>,
    programs: &mut Programs,
) -> Result<(), CaptureError> {
    if interfaces.is_empty() {
        return Ok(());
    }
    let mut names: Vec<&str> = interfaces.iter().flat_map(programs_for).map(|(name, _)| name).collect();
    names.sort_unstable();
    names.dedup();
    if !programs.cover(&interfaces) {
        let loader = Arc::clone(objects);
        // Not in the namespace: verifying takes the time, and the threads that enter namespaces are few.
        programs.0.extend(super::blocking(move || load(&loader, pod_id, &names)).await?);
    }
    let mut loaded = std::mem::take(&mut programs.0);
    let objects = Arc::clone(objects);
    let (result, loaded) = enter(netns, "attach tc programs", move || {
        let result = attach_all(&objects, method, pod_id, &interfaces, &mut loaded);
        Ok((result, loaded))
    })
    .await?;
    programs.0 = loaded;
    result
}

/// In the namespace of the calling thread.
fn attach_all(
    objects: &Objects,
    method: Method,
    pod_id: u32,
    interfaces: &[Interface],
    programs: &mut BTreeMap<&'static str, SchedClassifier>,
) -> Result<(), CaptureError> {
    for interface in interfaces {
        for (name, direction) in programs_for(interface) {
            let pin = TcPin { pod_id, interface: interface.index, direction, moved: false };
            let attached = match programs.get_mut(name) {
                Some(program) => attach_one(program, method, interface, pin, objects.layout()),
                None => Err(Failure::Other("the program is not loaded".to_owned())),
            };
            if let Err(Failure::StillThere) = attached {
                // The next attempt is with another one.
                programs.remove(name);
            }
            attached.map_err(|failure| CaptureError::Bpf {
                action: format!(
                    "attach {name} to interface {} (index {}) of pod {pod_id}",
                    interface.name, interface.index
                ),
                reason: failure.to_string(),
            })?;
        }
    }
    Ok(())
}

async fn enter<T: Send + 'static>(
    netns: &Netns,
    action: &str,
    work: impl FnOnce() -> Result<T, CaptureError> + Send + 'static,
) -> Result<T, CaptureError> {
    netns.try_run(work).await.unwrap_or_else(|e| {
        Err(CaptureError::Bpf { action: format!("{action} in {}", netns.path().display()), reason: e.to_string() })
    })
}

fn attach_one(
    program: &mut SchedClassifier,
    method: Method,
    interface: &Interface,
    pin: TcPin,
    layout: &Layout,
) -> Result<(), Failure> {
    let direction = pin.direction;
    // The other method's programs, of an agent that was configured differently, go once these are there.
    match method {
        Method::Tcx => {
            with_program(program, |program| links::ensure(layout, pin, hook(direction), program))?;
            remove_filters(&interface.name, direction)?;
            Ok(())
        }
        Method::Clsact => {
            attach_clsact(program, interface, direction)?;
            pins::remove(&layout.link(pin))?;
            Ok(())
        }
    }
}

fn attach_type(direction: Direction) -> TcAttachType {
    match direction {
        Direction::Ingress | Direction::Node => TcAttachType::Ingress,
        Direction::Egress => TcAttachType::Egress,
    }
}

fn hook(direction: Direction) -> Hook {
    match direction {
        Direction::Ingress | Direction::Node => Hook::TcxIngress,
        Direction::Egress => Hook::TcxEgress,
    }
}

/// A loaded program as [`links`] takes it.
pub fn with_program(
    program: &SchedClassifier,
    run: impl FnOnce(links::Program<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let id = program.info().map_err(|e| chain(&e))?.id();
    let fd = program.fd().map_err(|e| chain(&e))?;
    run(links::Program { fd: fd.as_fd(), id })
}

/// Adds the filter to an interface of the calling thread's namespace, or replaces the program of
/// the one that is there.
pub fn attach_clsact(program: &mut SchedClassifier, interface: &Interface, direction: Direction) -> Result<(), String> {
    let renamed = || {
        let same = if_nametoindex(interface.name.as_str()).is_ok_and(|index| index == interface.index);
        if same { Ok(()) } else { Err("the interface was renamed or removed meanwhile".to_owned()) }
    };
    renamed()?;
    match tc::qdisc_add_clsact(&interface.name) {
        Err(TcError::NetlinkError(e)) if e.raw_os_error() == Some(libc::EEXIST) => {}
        other => other.map_err(|e| chain(&e))?,
    }
    let kind = attach_type(direction);
    let ours =
        SchedClassifierLink::attached(&interface.name, kind, PRIORITY, HANDLE, None).map_err(|e| e.to_string())?;
    let replaced = program.attach_to_link(ours);
    let id = match replaced {
        Err(e) if is_not_found(&e) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program
                .attach_with_options(&interface.name, kind, TcAttachOptions::Netlink(options))
                .map_err(|e| chain(&e))?
        }
        other => other.map_err(|e| chain(&e))?,
    };
    let link = program.take_link(id).map_err(|e| chain(&e))?;
    // Dropping it would remove the filter, which has to outlive this process.
    std::mem::forget(link);
    renamed()
}

fn is_not_found(e: &ProgramError) -> bool {
    os_error(e) == Some(libc::ENOENT)
}

/// What the kernel answered.
fn os_error(e: &ProgramError) -> Option<i32> {
    match e {
        ProgramError::SyscallError(e) => e.io_error.raw_os_error(),
        ProgramError::TcError(TcError::NetlinkError(e)) | ProgramError::NetlinkError(e) => e.raw_os_error(),
        _ => None,
    }
}

/// Removes clsact filters that run our programs, by the programs' names; returns how many there were.
pub fn remove_filters(interface: &str, direction: Direction) -> Result<usize, String> {
    let names: &[&str] = match direction {
        Direction::Ingress => &[INBOUND, INBOUND_L3],
        Direction::Egress => &[GUARD, GUARD_L3],
        Direction::Node => &[NODE_GUARD],
    };
    let mut removed = 0;
    for name in names {
        match tc::qdisc_detach_program(interface, attach_type(direction), name) {
            Ok(()) => removed += 1,
            Err(e) if nothing_there(&e) => {}
            Err(e) => return Err(chain(&e)),
        }
    }
    Ok(removed)
}

/// No filter of this name, no clsact qdisc, no interface.
fn nothing_there(e: &TcError) -> bool {
    let code = match e {
        TcError::IoError(e) if e.kind() == io::ErrorKind::NotFound => return true,
        TcError::IoError(e) => e.raw_os_error(),
        TcError::NetlinkError(e) => e.raw_os_error(),
        _ => None,
    };
    matches!(code, Some(libc::ENOENT | libc::EINVAL | libc::ENODEV | libc::ENXIO))
}

/// Removes the pins of a pod, those on the node's side last; the kernel detaches the links with
/// them.
pub fn unpin(objects: &Objects, pod_id: u32) -> Result<(), CaptureError> {
    let mut pins = objects.layout().tc_pins()?;
    pins.retain(|(pin, _)| pin.pod_id == pod_id);
    pins.sort_by_key(|(pin, _)| pin.direction);
    for (_, path) in pins {
        pins::remove(&path)?;
    }
    Ok(())
}

/// Removes our clsact filters from every interface of a namespace; returns how many there were.
pub async fn detach_filters(netns: &Netns) -> Result<usize, CaptureError> {
    const ACTION: &str = "remove tc filters";
    let failed = |reason| CaptureError::Bpf { action: ACTION.to_owned(), reason };
    let interfaces = interfaces::list(netns).await.map_err(|e| failed(format!("listing interfaces: {e}")))?;
    enter(netns, ACTION, move || {
        let mut removed = 0;
        for interface in &interfaces {
            for direction in [Direction::Egress, Direction::Ingress] {
                removed += remove_filters(&interface.name, direction)
                    .map_err(|e| failed(format!("interface {}: {e}", interface.name)))?;
            }
        }
        Ok(removed)
    })
    .await
}
