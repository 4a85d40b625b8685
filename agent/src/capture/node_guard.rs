//! The guard on the node's side of pods' interfaces. Root in a pod can go around the guard inside
//! the pod: by a packet socket that bypasses the queueing discipline, by a program before ours, by
//! removing clsact filters, by moving the interface into another namespace. The other end of the
//! pair is in the node's namespace, where the pod has no rights, and every frame passes it.
//!
//! One program serves all pods: it knows them by the interface that it runs on (`NODE_INTERFACES`).
//! Everything here runs in the agent's own namespace, which is the node's.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::net::if_::if_indextoname;
use serde::{Deserialize, Serialize};
use underpass_abi::programs::NODE_GUARD;

use super::{
    CaptureError, desired, garbage,
    interfaces::{self, Interface, Other},
    links::{self, Failure},
    loader::Objects,
    maps::Maps,
    netns::Netns,
    pins::{self, Direction, Layout, TcPin},
    tc::{self, Method},
};
use crate::sys::bpf::{Hook, LinkTarget};

/// Kinds of interfaces that come in pairs, one end in the pod and one on the node.
const PAIRS: [&str; 2] = ["veth", "netkit"];

/// How an interface of a pod is guarded from the node's side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceGuard {
    /// Its name in the pod; `unknown` for one that was moved before this agent started.
    pub interface: String,
    /// What it is: `veth`, `netkit`, `macvlan`; `hardware` for virtual functions and other devices.
    pub kind: String,
    /// The node's interface that the guard is on. Absent: there is none, only the guard inside the
    /// pod, which root in the pod can go around.
    pub node_guard: Option<String>,
    /// The interface has left the pod's namespace. The guard stays on it.
    pub moved: bool,
}

/// The other end of a pod's interface, on the node.
struct Device {
    interface: Interface,
    netkit: bool,
}

struct Known {
    guard: InterfaceGuard,
    /// Index of the device on the node.
    device: Option<u32>,
}

/// Guards pods from the node's side.
pub struct NodeGuard {
    method: Method,
    objects: Arc<Objects>,
    maps: Arc<Maps>,
    /// By the pod's number and the interface's index in the pod.
    pods: Mutex<BTreeMap<u32, BTreeMap<u32, Known>>>,
}

impl NodeGuard {
    /// Takes what it needs.
    pub fn new(method: Method, objects: Arc<Objects>, maps: Arc<Maps>) -> Arc<Self> {
        Arc::new(Self { method, objects, maps, pods: Mutex::default() })
    }

    /// Guards these interfaces of a pod, or replaces the program that an earlier agent attached.
    /// One without an end on the node is no error: [`Self::interfaces`] says so.
    pub async fn attach(
        self: &Arc<Self>,
        netns: &Netns,
        pod_id: u32,
        interfaces: Vec<Interface>,
    ) -> Result<(), CaptureError> {
        let (this, netns) = (Arc::clone(self), netns.clone());
        super::blocking(move || interfaces.iter().try_for_each(|interface| this.attach_here(&netns, pod_id, interface)))
            .await
    }

    /// An interface has gone from the pod's namespace. Where it only moved, the guard stays.
    pub async fn interface_gone(self: &Arc<Self>, pod_id: u32, index: u32) -> Result<(), CaptureError> {
        let this = Arc::clone(self);
        super::blocking(move || this.gone_here(pod_id, index)).await
    }

    /// Removes the guards of a pod: the last thing that happens to one that leaves the mesh.
    pub async fn release(self: &Arc<Self>, pod_id: u32) -> Result<(), CaptureError> {
        let this = Arc::clone(self);
        super::blocking(move || this.release_here(pod_id)).await
    }

    /// Forgets devices that are gone, and what was pinned for them.
    pub async fn sweep(self: &Arc<Self>) -> Result<(), CaptureError> {
        let this = Arc::clone(self);
        super::blocking(move || {
            let known: Vec<_> = this.maps.tables().node_interfaces().iter().map(|(index, id)| (*index, *id)).collect();
            for (index, pod_id) in known {
                if device(index)?.is_none() {
                    this.forget(pod_id, index)?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Takes over what an older version, whose pins are about to be removed, guards and this one
    /// does not: interfaces that root in a pod has moved, so that no enrolment finds them.
    /// `namespaces` are those of the older version's pods: what is still in one of them belongs to
    /// a pod that is not wanted any more. Without a pod there are no exclusions.
    pub async fn take_over(self: &Arc<Self>, older: Layout, namespaces: Vec<Arc<Netns>>) -> Result<(), CaptureError> {
        let this = Arc::clone(self);
        super::blocking(move || this.take_over_here(&older, &namespaces)).await
    }

    fn take_over_here(&self, older: &Layout, namespaces: &[Arc<Netns>]) -> Result<(), CaptureError> {
        let failed =
            |reason: String| CaptureError::Bpf { action: "take over an older version's guards".into(), reason };
        for (pin, path) in older.tc_pins()? {
            let index = pin.interface;
            if pin.direction != Direction::Node || self.maps.tables().node_interfaces().contains_key(&index) {
                continue;
            }
            let Some((link, info)) = links::open(&path).map_err(|e| failed(e.to_string()))? else { continue };
            let Some(device) = device(index)?.filter(|_| info.target == LinkTarget::Interface(index)) else { continue };
            let number = device.other.and_then(|other| other.namespace);
            let in_place = namespaces
                .iter()
                .any(|netns| interfaces::namespace_number_here(netns).is_ok_and(|n| n.is_some() && n == number));
            if !in_place {
                let own = self.objects.layout().link(TcPin { pod_id: desired::ALL_PODS, ..pin });
                let updated =
                    tc::with_program(&self.objects.node_guard(), |program| links::update(&link, info, program, &path));
                updated.map_err(|e| failed(e.to_string()))?;
                pins::replace(&path, &own)?;
            }
        }
        Ok(())
    }

    /// How a pod's interfaces are guarded; those that only lead to others of the pod are left out.
    pub fn interfaces(&self, pod_id: u32) -> Vec<InterfaceGuard> {
        let devices = self.devices(pod_id);
        let pods = self.pods();
        let known = || pods.get(&pod_id).into_iter().flat_map(BTreeMap::values);
        // Those that an earlier agent guarded, and that were not in the pod any more when this one
        // came.
        let lost = devices.into_iter().filter(|index| known().all(|known| known.device != Some(*index)));
        let lost = lost.filter_map(|index| if_indextoname(index).ok()).map(|name| InterfaceGuard {
            interface: "unknown".to_owned(),
            kind: "unknown".to_owned(),
            node_guard: Some(name.to_string_lossy().into_owned()),
            moved: true,
        });
        known().map(|known| known.guard.clone()).chain(lost).collect()
    }

    /// Indices of the node's interfaces that lead to a pod.
    fn devices(&self, pod_id: u32) -> Vec<u32> {
        let tables = self.maps.tables();
        let devices = tables.node_interfaces().iter().filter(|(_, id)| **id == pod_id);
        devices.map(|(index, _)| *index).collect()
    }

    fn pods(&self) -> MutexGuard<'_, BTreeMap<u32, BTreeMap<u32, Known>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach_here(&self, netns: &Netns, pod_id: u32, interface: &Interface) -> Result<(), CaptureError> {
        let action =
            || format!("guard interface {} (index {}) of pod {pod_id} from the node", interface.name, interface.index);
        let device = find(netns, interface)
            .map_err(|e| CaptureError::Bpf { action: action(), reason: format!("looking for its other end: {e}") })?;
        if let Some(device) = &device {
            // First, so that the pod's exclusions hold from the first packet.
            self.maps.tables().set_node_interface(device.interface.index, Some(pod_id))?;
            self.attach_to(device, pod_id)
                .map_err(|reason| CaptureError::Bpf { action: action(), reason: reason.to_string() })?;
        }
        let mut pods = self.pods();
        if device.is_none() && !leaves_the_pod(interface) {
            pods.get_mut(&pod_id).map(|pod| pod.remove(&interface.index));
            return Ok(());
        }
        let guard = InterfaceGuard {
            interface: interface.name.clone(),
            kind: kind_of(interface),
            node_guard: device.as_ref().map(|device| device.interface.name.clone()),
            moved: false,
        };
        let known = Known { guard, device: device.map(|device| device.interface.index) };
        pods.entry(pod_id).or_default().insert(interface.index, known);
        Ok(())
    }

    fn attach_to(&self, device: &Device, pod_id: u32) -> Result<(), Failure> {
        let Device { interface, netkit } = device;
        let pin = TcPin { pod_id, interface: interface.index, direction: Direction::Node, moved: false };
        let layout = self.objects.layout();
        let mut program = self.objects.node_guard();
        if self.method == Method::Clsact {
            tc::attach_clsact(&mut program, interface, Direction::Node)?;
            pins::remove(&layout.link(pin))?;
            return Ok(());
        }
        // A netkit program of others may send a packet on before it arrives at the device, so ours
        // has to be there too. Only the primary end of a pair takes programs; a network plugin that
        // has given the pod the primary end left us the other hook.
        let native =
            netkit.then(|| tc::with_program(&program, |program| links::ensure(layout, pin, Hook::NetkitPeer, program)));
        match native {
            Some(Err(Failure::Kernel(_))) | None => {
                tc::with_program(&program, |program| links::ensure(layout, pin, Hook::TcxIngress, program))?;
            }
            Some(done) => done?,
        }
        tc::remove_filters(&interface.name, Direction::Node)?;
        Ok(())
    }

    fn gone_here(&self, pod_id: u32, index: u32) -> Result<(), CaptureError> {
        let known = self.pods().get(&pod_id).and_then(|pod| pod.get(&index)).and_then(|known| known.device);
        if let Some(known) = known {
            if device(known)?.is_some() {
                let mut pods = self.pods();
                if let Some(known) = pods.get_mut(&pod_id).and_then(|pod| pod.get_mut(&index)) {
                    known.guard.moved = true;
                }
                return Ok(());
            }
            self.forget(pod_id, known)?;
        }
        self.pods().get_mut(&pod_id).map(|pod| pod.remove(&index));
        Ok(())
    }

    fn release_here(&self, pod_id: u32) -> Result<(), CaptureError> {
        for index in self.devices(pod_id) {
            // Asking the kernel about an interface waits until it has ended the links of others.
            if self.method == Method::Clsact {
                remove_filters(index)?;
            }
            self.forget(pod_id, index)?;
        }
        self.pods().remove(&pod_id);
        Ok(())
    }

    fn forget(&self, pod_id: u32, index: u32) -> Result<(), CaptureError> {
        let pin = TcPin { pod_id, interface: index, direction: Direction::Node, moved: false };
        pins::remove(&self.objects.layout().link(pin))?;
        self.maps.tables().set_node_interface(index, None)
    }
}

/// The interfaces by which packets leave the namespaces of this machine and that have no other end
/// here, so that no pod with such an interface can be guarded from the node's side: path of the
/// namespace, name and kind of the interface. Also how many namespaces were looked at. Nothing is
/// attached.
pub async fn unguarded() -> (usize, Vec<(PathBuf, String, String)>) {
    let namespaces = super::blocking(garbage::all).await;
    let mut found = Vec::new();
    for netns in &namespaces {
        // One that goes away meanwhile has none.
        for interface in interfaces::list(netns).await.unwrap_or_default() {
            let entry = (netns.path().to_owned(), interface.name.clone(), kind_of(&interface));
            let inside = netns.clone();
            let lost = move || leaves_the_pod(&interface) && matches!(find(&inside, &interface), Ok(None));
            if super::blocking(lost).await {
                found.push(entry);
            }
        }
    }
    (namespaces.len(), found)
}

fn kind_of(interface: &Interface) -> String {
    interface.kind.clone().unwrap_or_else(|| "hardware".to_owned())
}

/// Removes our filters from a device of the node; returns how many there were.
pub fn remove_filters(index: u32) -> Result<usize, CaptureError> {
    let Some(interface) = device(index)? else { return Ok(0) };
    tc::remove_filters(&interface.name, Direction::Node).map_err(|reason| CaptureError::Bpf {
        action: format!("remove {NODE_GUARD} from interface {} of the node", interface.name),
        reason,
    })
}

fn device(index: u32) -> Result<Option<Interface>, CaptureError> {
    interfaces::find_here(index).map_err(|e| CaptureError::Bpf {
        action: format!("look for interface {index} of the node"),
        reason: e.to_string(),
    })
}

/// The other end of a pod's interface, if the node has it. The pod's side only gives an index,
/// which in every namespace is another interface: it counts when the interface on the node says
/// that its own other end is this one, in this namespace.
fn find(netns: &Netns, interface: &Interface) -> io::Result<Option<Device>> {
    let Some(kind) = interface.kind.as_deref().filter(|kind| PAIRS.contains(kind)) else { return Ok(None) };
    let Some(Other { index, namespace: Some(_) }) = interface.other else { return Ok(None) };
    let Some(device) = interfaces::find_here(index)? else { return Ok(None) };
    // Asked for after the device: the kernel gives a namespace its number when the first interface
    // names it.
    let Some(namespace) = interfaces::namespace_number_here(netns)? else { return Ok(None) };
    let ours = Other { index: interface.index, namespace: Some(namespace) };
    let netkit = kind == "netkit";
    let matches = device.kind.as_deref() == Some(kind) && device.other == Some(ours);
    Ok(matches.then_some(Device { interface: device, netkit }))
}

/// Do packets leave the pod by this interface itself, and not by another one of the pod? Hardware
/// does; so does whatever is on top of an interface of another namespace, and a tun device, behind
/// which any process may be.
fn leaves_the_pod(interface: &Interface) -> bool {
    match interface.kind.as_deref() {
        None | Some("tun") => true,
        Some(_) => interface.other.is_some_and(|other| other.namespace.is_some()),
    }
}
