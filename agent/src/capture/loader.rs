//! Loads the object and attaches the cgroup hooks: adopts what an earlier agent pinned, replaces its programs in place.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, RingBuf},
    programs::{CgroupAttachMode, Program, SchedClassifier, links::FdLink},
};
use aya_log::EbpfLogger;
use underpass_abi::{POD_ID_GLOBAL, capacity, programs};

use super::{
    CaptureError, CaptureOptions,
    events::BpfLog,
    links,
    lock::PinLock,
    maps::{Maps, PINNED, chain, check_pinned},
    object,
    pins::{self, Layout},
};
use crate::sys::bpf::{self, LinkTarget};

/// Map of aya-log, in the object built with it.
pub const LOG_MAP: &str = "AYA_LOGS";

/// Pin names and programs of the cgroup hooks, in the order in which they attach: nothing is captured before what
/// capture relies on runs.
pub const HOOKS: [(&str, &str); 7] = [
    ("sockops", programs::SOCKOPS),
    ("getpeername4", programs::GETPEERNAME4),
    ("getpeername6", programs::GETPEERNAME6),
    ("getsockname4", programs::GETSOCKNAME4),
    ("getsockname6", programs::GETSOCKNAME6),
    ("connect4", programs::CONNECT4),
    ("connect6", programs::CONNECT6),
];

/// Everything a start yields.
pub struct Started {
    /// Held while the agent lives.
    pub lock: PinLock,
    /// Loads the tc programs of pods.
    pub objects: Arc<Objects>,
    /// The maps.
    pub maps: Maps,
    /// Records what a probe cgroup sends; attached where such cgroups are.
    pub probe: OwnedFd,
    /// Where refusals are reported.
    pub events: RingBuf<MapData>,
    /// Lines of aya-log, when asked for.
    pub log: Option<EbpfLogger<BpfLog>>,
}

/// The object, ready to be loaded again and again with the maps of the first time.
pub struct Objects {
    layout: Layout,
    bytes: &'static [u8],
    /// Kept because making one reads and parses the kernel's BTF.
    loader: Mutex<EbpfLoader<'static>>,
    /// Kernel numbers of the pinned maps.
    map_ids: BTreeMap<&'static str, u32>,
    /// Loaded ahead of their use: the kernel takes milliseconds to verify them, and a pod's start
    /// waits.
    spare: Mutex<Spare>,
    /// What was being loaded ahead is there, or failed.
    loaded: Condvar,
    /// Held by whoever loads ahead.
    preparing: Mutex<()>,
    /// The one program on the node's side of all pods' interfaces.
    node_guard: Mutex<SchedClassifier>,
}

/// Programs that are loaded ahead, by the pod's number.
#[derive(Default)]
struct Spare {
    ready: BTreeMap<u32, Ebpf>,
    loading: Option<u32>,
}

/// Programs that are loaded ahead: those for Ethernet, which is what pods have.
const AHEAD: [&str; 2] = [programs::GUARD, programs::INBOUND];
/// For how many pods. Kubelets start few at once.
pub const SPARES: usize = 4;
/// Longer than loading takes. Whoever has waited so long loads programs for himself.
const LONGEST_LOAD: Duration = Duration::from_secs(5);
/// Most that are kept.
const MOST_SPARES: usize = 16;

/// Loads and attaches. Blocks.
pub fn start(options: &CaptureOptions) -> Result<Started, CaptureError> {
    pins::check_cgroup(&options.cgroup)?;
    pins::prepare_root(&options.pin_root)?;
    let lock = PinLock::acquire(&options.pin_root)?;
    let layout = Layout::new(&options.pin_root, object::ABI_HASH);
    let fresh = !layout.dir().exists();
    layout.create()?;
    start_in(options, &layout)
        .map(|(objects, maps, probe, events, log)| Started { lock, objects, maps, probe, events, log })
        .inspect_err(|_| {
            // What an earlier agent left stays: it fails closed. What this start made does nothing yet.
            if fresh && let Err(e) = super::cleanup::remove_version(&layout) {
                tracing::warn!(error = %e, directory = %layout.dir().display(), "cannot remove pins of a failed start");
            }
        })
}

type Parts = (Arc<Objects>, Maps, OwnedFd, RingBuf<MapData>, Option<EbpfLogger<BpfLog>>);

fn start_in(options: &CaptureOptions, layout: &Layout) -> Result<Parts, CaptureError> {
    let bytes = if options.bpf_log { object::OBJECT_WITH_LOG } else { object::OBJECT };
    let mut loader = loader(layout, options.bpf_log);
    let mut bpf = loader.load(bytes).map_err(|e| load_failed(&e))?;
    check_pinned(&bpf, layout)?;
    let map_ids = PINNED.iter().map(|(name, ..)| Ok((*name, map_id(&bpf, name)?))).collect::<Result<_, _>>()?;
    let log = options
        .bpf_log
        .then(|| EbpfLogger::init_with_logger(&mut bpf, BpfLog))
        .transpose()
        .map_err(|e| CaptureError::Bpf { action: "read the programs' log".to_owned(), reason: chain(&e) })?;
    attach_hooks(&mut bpf, layout, &options.cgroup)?;
    load(&mut bpf, programs::PROBE)?;
    let probe = bpf.program(programs::PROBE).expect("loaded above").fd();
    let probe = probe.map_err(|e| chain(&e)).and_then(|fd| fd.as_fd().try_clone_to_owned().map_err(|e| e.to_string()));
    let probe = probe.map_err(|reason| CaptureError::Bpf { action: "keep program up_probe".to_owned(), reason })?;
    let node_guard = adopt_node_guards(&mut bpf, layout)?;
    let (maps, events) = Maps::take(&mut bpf, options.mesh_entries)?;
    // Connections that an earlier agent did not accept went away with its listeners. Those that had already ended on the
    // application's side keep their entry (their data would have been lost otherwise), so they are forgotten here, before
    // there are listeners again. Connections of an agent that is still here wait in the listeners that it has handed over.
    if options.inheritance.is_empty() {
        maps.flows.forget(|_| true)?;
    }
    maps.flows.settle()?;
    let objects = Objects {
        layout: layout.clone(),
        bytes,
        loader: Mutex::new(loader),
        map_ids,
        spare: Mutex::default(),
        loaded: Condvar::new(),
        preparing: Mutex::default(),
        node_guard: Mutex::new(node_guard),
    };
    Ok((Arc::new(objects), maps, probe, events, log))
}

/// Loads the guard of the node's side and gives it to every interface that an earlier agent
/// guarded. Those of pods too whose interface is in another namespace by now, where no enrolment
/// would find it.
fn adopt_node_guards(bpf: &mut Ebpf, layout: &Layout) -> Result<SchedClassifier, CaptureError> {
    let failed = |reason| CaptureError::Bpf { action: format!("load program {}", programs::NODE_GUARD), reason };
    load(bpf, programs::NODE_GUARD)?;
    let program = super::tc::take_program(bpf, programs::NODE_GUARD).map_err(failed)?;
    for (pin, path) in layout.tc_pins()? {
        if pin.direction != pins::Direction::Node {
            continue;
        }
        let adopted = links::open(&path).and_then(|found| match found {
            Some((link, info)) if !links::is_dead(info) => {
                super::tc::with_program(&program, |program| links::update(&link, info, program, &path))
            }
            // Whoever collects garbage removes it.
            _ => Ok(()),
        });
        adopted.map_err(|e| failed(e.to_string()))?;
    }
    Ok(program)
}

fn loader(layout: &Layout, with_log: bool) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    // Rust programs carry no CO-RE relocations; the kernel's BTF would only take memory.
    loader.btf(None);
    let log = with_log.then_some(LOG_MAP);
    for name in PINNED.iter().map(|(name, ..)| *name).chain(log) {
        loader.map_pin_path(name, layout.map(name));
    }
    loader
}

fn load_failed(e: &aya::EbpfError) -> CaptureError {
    CaptureError::Bpf { action: "load the BPF object".to_owned(), reason: chain(e) }
}

fn map_id(bpf: &Ebpf, name: &'static str) -> Result<u32, CaptureError> {
    use aya::maps::Map;
    let failed = |reason| CaptureError::Bpf { action: format!("look at map {name}"), reason };
    let data = match bpf.map(name) {
        Some(
            Map::HashMap(d)
            | Map::LruHashMap(d)
            | Map::LpmTrie(d)
            | Map::SkStorage(d)
            | Map::RingBuf(d)
            | Map::PerCpuArray(d)
            | Map::Array(d),
        ) => d,
        Some(_) => return Err(failed("it has an unexpected type".to_owned())),
        None => return Err(failed("the object has none of this name".to_owned())),
    };
    data.info().map(|i| i.id()).map_err(|e| failed(chain(&e)))
}

/// Attaches every hook, or replaces the program of the one that is pinned.
fn attach_hooks(bpf: &mut Ebpf, layout: &Layout, cgroup: &Path) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Path { action: "open cgroup", path: cgroup.into(), source };
    let directory = File::open(cgroup).map_err(failed)?;
    // The kernel's id of a cgroup is the inode number of its directory.
    let id = directory.metadata().map_err(failed)?.ino();
    for (_, program) in HOOKS {
        load(bpf, program)?;
    }
    for (hook, program) in HOOKS {
        let program = bpf.program_mut(program).expect("loaded above");
        attach_hook(program, &directory, id, &layout.link(hook)).map_err(|reason| CaptureError::Bpf {
            action: format!("attach {hook} to cgroup {}", cgroup.display()),
            reason,
        })?;
    }
    Ok(())
}

fn load(bpf: &mut Ebpf, name: &'static str) -> Result<(), CaptureError> {
    let failed = |reason| CaptureError::Bpf { action: format!("load program {name}"), reason };
    let program = bpf.program_mut(name).ok_or_else(|| failed("the object has none of this name".to_owned()))?;
    match program {
        Program::CgroupSockAddr(p) => p.load(),
        Program::SockOps(p) => p.load(),
        Program::CgroupSkb(p) => p.load(),
        Program::SchedClassifier(p) => p.load(),
        _ => return Err(failed("it has an unexpected type".to_owned())),
    }
    .map_err(|e| failed(chain(&e)))
}

fn attach_hook(program: &mut Program, cgroup: &File, cgroup_id: u64, pin: &Path) -> Result<(), String> {
    let program_fd = program.fd().and_then(|fd| Ok(fd.try_clone()?)).map_err(|e| chain(&e))?;
    let pinned = match bpf::object_get(pin) {
        Ok(link) => match bpf::link_info(link.as_fd()) {
            Ok(info) if info.target == LinkTarget::Cgroup(cgroup_id) => {
                return bpf::link_update(link.as_fd(), program_fd.as_fd())
                    .map_err(|e| format!("replacing the program of {}: {e}", pin.display()));
            }
            _ => true, // on another cgroup, or on one that is gone
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => return Err(format!("opening {}: {e}", pin.display())),
    };
    let link = new_link(program, cgroup).map_err(|e| chain(&*e))?;
    let pin_at = |link: FdLink, path: &Path| link.pin(path).map(drop).map_err(|e| chain(&e));
    if !pinned {
        return pin_at(link, pin);
    }
    // Both run until the rename drops the old one: the second to run sees a loopback destination and leaves it alone.
    let new = pins::replacement(pin).map_err(|e| e.to_string())?;
    pin_at(link, &new)?;
    pins::replace(&new, pin).map_err(|e| e.to_string())
}

fn new_link(program: &mut Program, cgroup: &File) -> Result<FdLink, Box<dyn std::error::Error>> {
    // No flags. A link always allows others beside it; `AllowMultiple` is for the older kind of attachment, and refused
    // here.
    let mode = CgroupAttachMode::Single;
    Ok(match program {
        Program::CgroupSockAddr(p) => {
            let id = p.attach(cgroup, mode)?;
            p.take_link(id)?.try_into()?
        }
        Program::SockOps(p) => {
            let id = p.attach(cgroup, mode)?;
            p.take_link(id)?.try_into()?
        }
        _ => return Err("not a program for a cgroup".into()),
    })
}

/// `POD_IDS[n]` is `n`: the loader keeps a reference to the value of a global for as long as itself.
static POD_IDS: [u32; capacity::PODS + 1] = {
    let mut ids = [0; capacity::PODS + 1];
    let mut n = 0;
    while n < ids.len() {
        ids[n] = n as u32;
        n += 1;
    }
    ids
};

impl Objects {
    /// Where the links go.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Loads programs for pods that will have these numbers, if there are none. Blocks. At once when somebody else is at it.
    pub fn prepare(&self, numbers: &[u32]) {
        let Ok(_turn) = self.preparing.try_lock() else { return };
        for number in numbers {
            {
                let mut spare = self.spare();
                // A number that was given to a pod meanwhile still has its programs here until they
                // are taken.
                if spare.ready.len() >= MOST_SPARES {
                    spare.ready.retain(|number, _| numbers.contains(number));
                }
                if spare.ready.contains_key(number) {
                    continue;
                }
                spare.loading = Some(*number);
            }
            let loaded = self.load_now(*number, &AHEAD);
            let mut spare = self.spare();
            spare.loading = None;
            let error = loaded.map(|loaded| spare.ready.insert(*number, loaded)).err();
            drop(spare);
            self.loaded.notify_all();
            // Whoever needs them gets the error.
            if let Some(error) = error {
                return tracing::debug!(%error, "no programs ahead of their use");
            }
        }
    }

    /// The guard of the node's side.
    pub fn node_guard(&self) -> MutexGuard<'_, SchedClassifier> {
        self.node_guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The programs that were loaded ahead for a pod. Waits for those that are just being loaded:
    /// verifying them twice at once takes longer.
    fn take_spare(&self, pod_id: u32) -> Option<Ebpf> {
        let is_loading = |spare: &mut Spare| spare.loading == Some(pod_id);
        let waited = self.loaded.wait_timeout_while(self.spare(), LONGEST_LOAD, is_loading);
        waited.unwrap_or_else(PoisonError::into_inner).0.ready.remove(&pod_id)
    }

    fn spare(&self) -> MutexGuard<'_, Spare> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads these tc programs for a pod, or takes those that were loaded ahead. Only the programs are per pod; the maps are the pinned ones, or it fails.
    pub fn load_for_pod(&self, pod_id: u32, names: &[&'static str]) -> Result<Ebpf, CaptureError> {
        if names.iter().all(|name| AHEAD.contains(name))
            && let Some(ahead) = self.take_spare(pod_id)
        {
            self.check_maps(&ahead, pod_id)?;
            return Ok(ahead);
        }
        self.load_now(pod_id, names)
    }

    fn load_now(&self, pod_id: u32, names: &[&'static str]) -> Result<Ebpf, CaptureError> {
        let mut bpf = {
            let id = POD_IDS.get(pod_id as usize).ok_or(CaptureError::Capacity {
                map: "PODS",
                capacity: capacity::PODS,
                needed: pod_id as usize,
            })?;
            let mut loader = self.loader.lock().unwrap_or_else(PoisonError::into_inner);
            loader.override_global(POD_ID_GLOBAL, id, true);
            loader.load(self.bytes).map_err(|e| load_failed(&e))?
        };
        self.check_maps(&bpf, pod_id)?;
        for name in names {
            load(&mut bpf, name)?;
        }
        Ok(bpf)
    }

    fn check_maps(&self, bpf: &Ebpf, pod_id: u32) -> Result<(), CaptureError> {
        for (name, id) in &self.map_ids {
            // Had somebody removed the pin, the loader would have made a new and empty map.
            if map_id(bpf, name)? != *id {
                return Err(CaptureError::Bpf {
                    action: format!("load programs for pod {pod_id}"),
                    reason: format!(
                        "{} is not the map this agent started with; restart the agent",
                        self.layout.map(name).display()
                    ),
                });
            }
        }
        Ok(())
    }
}
