//! A cgroup, a pin directory and namespaces that belong to one test, and go with it.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use testbed::pace::patience;
use tokio::time::{sleep, timeout};

use super::super::{
    Capture, CaptureOptions, TcMode, cleanup,
    inheritance::Inheritance,
    lock::PinLock,
    object,
    pins::{self, Layout},
};
use crate::{
    mesh::{MeshSettings, Snapshot, SnapshotBuilder, Workload},
    sys::bpf::{self, LinkInfo},
};

/// The pod's end and the peer's end of the first veth pair of a [`Lab::pod`].
pub const POD: &str = "10.7.0.1";
pub const PEER: &str = "10.7.0.2";
pub const POD6: &str = "fd07::1";
pub const PEER6: &str = "fd07::2";
/// No step of these tests takes longer on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Where cgroup v2 is mounted.
pub fn cgroup_mount() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2"));
    PathBuf::from(line.expect("these tests need cgroup v2").split(' ').nth(1).unwrap())
}

pub struct Lab {
    name: String,
    pub cgroup: PathBuf,
    pub pins: PathBuf,
    namespaces: Mutex<Vec<String>>,
}

/// Two connected namespaces.
pub struct Net {
    pub pod: String,
    pub peer: String,
}

impl Net {
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.pod)
    }
}

impl Lab {
    pub fn new() -> Self {
        let name = format!("up{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let lab = Self {
            cgroup: cgroup_mount().join(&name),
            pins: PathBuf::from("/sys/fs/bpf").join(&name),
            namespaces: Mutex::default(),
            name,
        };
        fs::create_dir(&lab.cgroup).expect("these tests need root");
        fs::create_dir(lab.pods_cgroup()).unwrap();
        lab
    }

    /// Where the pods' processes are: below the attach point.
    fn pods_cgroup(&self) -> PathBuf {
        self.cgroup.join("pods")
    }

    pub fn options(&self) -> CaptureOptions {
        CaptureOptions {
            cgroup: self.cgroup.clone(),
            pin_root: self.pins.clone(),
            tc: TcMode::Auto,
            mesh_entries: underpass_abi::capacity::MESH,
            bpf_log: false,
            inheritance: Inheritance::default(),
        }
    }

    pub async fn start(&self) -> Arc<Capture> {
        Capture::start(self.options()).await.unwrap()
    }

    pub async fn start_with(&self, tc: TcMode) -> Arc<Capture> {
        Capture::start(CaptureOptions { tc, ..self.options() }).await.unwrap()
    }

    pub fn layout(&self) -> Layout {
        Layout::new(&self.pins, object::ABI_HASH)
    }

    /// An empty namespace.
    pub fn namespace(&self, tag: &str) -> String {
        let name = format!("{}-{tag}", self.name);
        ip(&format!("netns add {name}"));
        self.namespaces.lock().unwrap().push(name.clone());
        ip(&format!("-n {name} link set lo up"));
        name
    }

    /// A pod and its peer.
    pub fn pod(&self, tag: &str) -> Net {
        let (pod, peer) = (self.namespace(tag), self.namespace(&format!("{tag}-peer")));
        ip(&format!("link add eth0 netns {pod} type veth peer name eth0 netns {peer}"));
        for (ns, v4, v6) in [(&pod, POD, POD6), (&peer, PEER, PEER6)] {
            ip(&format!("-n {ns} addr add {v4}/24 dev eth0"));
            ip(&format!("-n {ns} addr add {v6}/64 dev eth0 nodad"));
            ip(&format!("-n {ns} link set eth0 up"));
        }
        Net { pod, peer }
    }

    /// Runs a shell script in a namespace, as a process of a pod or as one outside.
    pub async fn shell(&self, namespace: &str, in_pod: bool, script: &str) -> Output {
        let cgroup = if in_pod { self.pods_cgroup() } else { cgroup_mount() };
        let enter =
            format!("echo $$ > {}/cgroup.procs && exec ip netns exec {namespace} bash -c \"$0\"", cgroup.display());
        let mut command = tokio::process::Command::new("bash");
        command.args(["-c", &enter, script]).kill_on_drop(true);
        timeout(patience(DEADLINE), command.output()).await.expect("the script takes too long").unwrap()
    }

    /// Can a process connect there?
    pub async fn connects(&self, namespace: &str, in_pod: bool, host: &str, port: u16) -> Connected {
        let script = format!("timeout 1.5 bash -c 'exec 3<>/dev/tcp/{host}/{port}'");
        let output = self.shell(namespace, in_pod, &script).await;
        let errors = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => Connected::Yes,
            Some(124) => Connected::TimedOut,
            _ if errors.contains("refused") => Connected::Refused,
            _ => panic!("{script}: {output:?}"),
        }
    }

    /// Every pinned link of the version in use, by name.
    pub fn links(&self) -> BTreeMap<String, LinkInfo> {
        let info = |path: &Path| match bpf::object_get(path) {
            Ok(link) => Some(bpf::link_info(link.as_fd()).unwrap()),
            // Renamed or removed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => panic!("{}: {error}", path.display()),
        };
        pins::list(&self.layout().links())
            .unwrap()
            .into_iter()
            .filter_map(|p| Some((p.file_name().unwrap().to_str().unwrap().to_owned(), info(&p)?)))
            .collect()
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Connected {
    Yes,
    Refused,
    TimedOut,
}

impl Drop for Lab {
    fn drop(&mut self) {
        let report = |what: &str, result: io::Result<()>| {
            if let Err(e) = result {
                eprintln!("cleaning up {what}: {e}");
            }
        };
        for name in self.namespaces.lock().unwrap().iter() {
            report(name, Command::new("ip").args(["netns", "del", name]).status().map(drop));
        }
        for layout in pins::versions(&self.pins, None).unwrap_or_default() {
            report("pins", cleanup::remove_version(&layout).map(drop).map_err(io::Error::other));
        }
        let _ = fs::remove_dir(&self.pins);
        if let Ok(lock) = PinLock::acquire(&self.pins) {
            report("lock", lock.remove().map_err(io::Error::other));
        }
        report("cgroup", fs::write(self.cgroup.join("cgroup.kill"), "1"));
        for dir in [self.pods_cgroup(), self.cgroup.join("other"), self.cgroup.clone()] {
            // Killed processes leave a cgroup when they have ended.
            for _ in 0..100 {
                match fs::remove_dir(&dir) {
                    Err(e) if e.kind() == io::ErrorKind::ResourceBusy => std::thread::sleep(Duration::from_millis(20)),
                    _ => break,
                }
            }
        }
        if self.cgroup.exists() {
            eprintln!("{} is left behind", self.cgroup.display());
        }
    }
}

/// Runs `ip` and returns what it prints.
pub fn ip(arguments: &str) -> String {
    tool("ip", arguments)
}

/// Runs a tool and returns what it prints.
pub fn tool(name: &str, arguments: &str) -> String {
    let output = Command::new(name).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{name} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Waits for something that nobody announces.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(patience(DEADLINE), wait).await.unwrap_or_else(|_| panic!("still not true: {what}"));
}

/// A mesh of these workloads and nothing else.
pub fn snapshot(settings: MeshSettings, workloads: Vec<Workload>) -> Snapshot {
    let mut builder = SnapshotBuilder::new("node", "cluster.local".parse().unwrap(), settings);
    for w in workloads {
        builder.workload(w).unwrap();
    }
    builder.build()
}
