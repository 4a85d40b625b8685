//! tcx and netkit links on interfaces, each pinned by a name that says whose it is.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use super::{
    CaptureError,
    pins::{self, Layout, TcPin},
};
use crate::sys::{
    bpf::{self, Hook, LinkInfo, LinkTarget},
    rcu::ShortGracePeriods,
};

/// Why a program is not on an interface.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The kernel has a program on an interface only once, and a link that was given up goes a
    /// moment later.
    #[error("the program is on it already, by a link that was given up")]
    StillThere,
    /// The kernel does not attach it, or does not say what is attached.
    #[error("{0}")]
    Kernel(#[from] io::Error),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Other(reason)
    }
}

impl From<CaptureError> for Failure {
    fn from(error: CaptureError) -> Self {
        Self::Other(error.to_string())
    }
}

/// A program, and its number.
#[derive(Clone, Copy)]
pub struct Program<'a> {
    /// Its descriptor.
    pub fd: BorrowedFd<'a>,
    /// The kernel's number of it.
    pub id: u32,
}

/// Makes sure that this program, and no earlier one of ours, runs at `hook` of the interface that
/// `pin` names, which is in the calling thread's namespace. An index is used again, so a pin alone
/// says little: the kernel is asked which links the interface has.
pub fn ensure(layout: &Layout, pin: TcPin, hook: Hook, program: Program<'_>) -> Result<(), Failure> {
    let here = bpf::links_on(pin.interface, hook)?;
    let path = layout.link(pin);
    let mut occupied = false;
    if let Some((link, info)) = open(&path)? {
        if here.contains(&info.id) {
            return update(&link, info, program, &path);
        }
        occupied = !set_aside(layout, pin, info)?;
    }
    // The interface may have been away, and be back.
    for id in here {
        let away = layout.link(moved(pin, id));
        if let Some((link, info)) = open(&away)?
            && info.id == id
        {
            update(&link, info, program, &away)?;
            return Ok(pins::replace(&away, &path)?);
        }
    }
    let _fast = ShortGracePeriods::begin();
    let link = match bpf::link_create_first(program.fd, pin.interface, hook) {
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => return Err(Failure::StillThere),
        link => link?,
    };
    let pin_at = |path: &Path| {
        bpf::object_pin(link.as_fd(), path).map_err(|e| Failure::Other(format!("pinning {}: {e}", path.display())))
    };
    if !occupied {
        return pin_at(&path);
    }
    let new = pins::replacement(&path)?;
    pin_at(&new)?;
    Ok(pins::replace(&new, &path)?)
}

/// The interface of this pod has gone from the pod's namespace. Links go with an interface that
/// does not exist any more; on one that only moved they stay, under another name.
pub fn interface_gone(layout: &Layout, pod_id: u32, index: u32) -> Result<(), CaptureError> {
    for direction in [pins::Direction::Ingress, pins::Direction::Egress] {
        let pin = TcPin { pod_id, interface: index, direction, moved: false };
        let path = layout.link(pin);
        let failed =
            |e: Failure| CaptureError::Bpf { action: "look after moved links".to_owned(), reason: e.to_string() };
        if let Some((_, info)) = open(&path).map_err(failed)?
            && !set_aside(layout, pin, info).map_err(failed)?
        {
            pins::remove(&path)?;
        }
    }
    Ok(())
}

/// Removes the pins of links whose interface does not exist any more, of one pod or of all.
pub fn remove_dead(layout: &Layout, pod_id: Option<u32>) -> Result<(), CaptureError> {
    for (pin, path) in layout.tc_pins()? {
        let wanted = pod_id.is_none_or(|id| id == pin.pod_id);
        if wanted && open(&path).is_ok_and(|found| found.is_some_and(|(_, info)| is_dead(info))) {
            pins::remove(&path)?;
        }
    }
    Ok(())
}

/// Opens a pinned link; `None` when nothing is pinned there.
pub fn open(path: &Path) -> Result<Option<(OwnedFd, LinkInfo)>, Failure> {
    let failed = |e: io::Error| Failure::Other(format!("opening {}: {e}", path.display()));
    match bpf::object_get(path) {
        Ok(link) => {
            let info = bpf::link_info(link.as_fd()).map_err(failed)?;
            Ok(Some((link, info)))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed(e)),
    }
}

/// Is the interface of this link gone for good?
pub fn is_dead(info: LinkInfo) -> bool {
    info.target == LinkTarget::Interface(0)
}

/// Makes a pinned link run this program.
pub fn update(link: &OwnedFd, info: LinkInfo, program: Program<'_>, path: &Path) -> Result<(), Failure> {
    if info.program_id == program.id {
        return Ok(());
    }
    bpf::link_update(link.as_fd(), program.fd)
        .map_err(|e| Failure::Other(format!("replacing the program of {}: {e}", path.display())))
}

/// Gives the pin of a link that lives elsewhere its other name. False when the link's interface is
/// gone.
fn set_aside(layout: &Layout, pin: TcPin, info: LinkInfo) -> Result<bool, Failure> {
    if is_dead(info) {
        return Ok(false);
    }
    pins::replace(&layout.link(pin), &layout.link(moved(pin, info.id)))?;
    Ok(true)
}

fn moved(pin: TcPin, link: u32) -> TcPin {
    TcPin { interface: link, moved: true, ..pin }
}
