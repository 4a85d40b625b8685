//! Tests of entering namespaces, and the namespaces that the tests of the neighbouring modules use.

use std::{
    collections::HashSet,
    fs,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};
use testbed::pace::patience;

use super::{Netns, workers::Workers};
use crate::{
    capture::{
        EnrollError,
        interfaces::{self, Change},
    },
    mesh::PodNamespace,
    sys::net::netns_cookie,
};

/// Longer than anything takes that a test waits for.
pub(in crate::capture) static PATIENCE: LazyLock<Duration> = LazyLock::new(|| patience(Duration::from_secs(10)));

/// A namespace made with `ip netns add`; removed when dropped.
pub(in crate::capture) struct TestNamespace {
    name: String,
}

impl TestNamespace {
    pub(in crate::capture) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("up-t{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        let this = Self { name };
        this.ip(&["link", "set", "lo", "up"]);
        this
    }

    pub(in crate::capture) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    pub(in crate::capture) fn open(&self) -> Arc<Netns> {
        Netns::open(&self.path()).expect("a namespace that was just made")
    }

    /// Opens it on workers that no other test uses.
    fn open_apart(&self, workers: &'static Workers) -> Arc<Netns> {
        let shared = self.open();
        Arc::new(Netns { workers, ..(*shared).clone() })
    }

    /// Runs `ip -n NAME ...`.
    pub(in crate::capture) fn ip(&self, arguments: &[&str]) -> String {
        ip(&[&["-n", &self.name], arguments].concat())
    }

    /// A command that will run inside.
    pub(in crate::capture) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).stdin(Stdio::null());
        command
    }

    /// Sets a value under `/proc/sys/net`.
    pub(in crate::capture) fn sysctl(&self, name: &str, value: &str) {
        let status = self.command("sysctl").args(["-q", "-w", &format!("{name}={value}")]).status();
        assert!(status.expect("sysctl").success(), "{name}={value}");
    }
}

impl Drop for TestNamespace {
    fn drop(&mut self) {
        // A test that failed may have left it in any state.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A pod (10.77.0.2, `fd77::2`) and a client (10.77.0.1, `fd77::1`) on one wire. The client is the pod's default gateway.
pub(in crate::capture) fn pod_and_client() -> (TestNamespace, TestNamespace) {
    let (pod, client) = (TestNamespace::new(), TestNamespace::new());
    pod.ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &client.name]);
    for (namespace, number) in [(&pod, 2), (&client, 1)] {
        namespace.ip(&["addr", "add", &format!("10.77.0.{number}/24"), "dev", "eth0"]);
        namespace.ip(&["addr", "add", &format!("fd77::{number}/64"), "dev", "eth0", "nodad"]);
        namespace.ip(&["link", "set", "eth0", "up"]);
    }
    pod.ip(&["route", "add", "default", "via", "10.77.0.1"]);
    pod.ip(&["-6", "route", "add", "default", "via", "fd77::1"]);
    (pod, client)
}

/// A `mark` that counts its calls.
pub(in crate::capture) fn counting_mark() -> (Arc<crate::capture::sockets::Mark>, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&count);
    let mark = Arc::new(move |_: std::os::fd::BorrowedFd<'_>| {
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    (mark, count)
}

fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().expect("the ip program");
    assert!(
        output.status.success(),
        "ip {}: {} (these tests need root)",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

fn cookie_here() -> u64 {
    netns_cookie(Socket::new(Domain::IPV4, Type::DGRAM, None).expect("socket").as_fd()).expect("cookie")
}

#[test]
fn opening_refuses_what_is_no_pod() {
    let file = tempfile::NamedTempFile::new().expect("file");
    let fifo = tempfile::tempdir().expect("directory");
    nix::unistd::mkfifo(&fifo.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
    for (path, reason) in [
        (Path::new("/run/netns/no-such-namespace-here"), "is the pod running"),
        (file.path(), "give a path like /run/netns/NAME"),
        (&fifo.path().join("fifo"), "give a path like /run/netns/NAME"),
        (Path::new("/proc/self/ns/mnt"), "give a path like /run/netns/NAME"),
        (Path::new("/proc/self/ns/net"), "host network cannot be enrolled"),
    ] {
        let error = Netns::open(path).expect_err("not a pod's namespace");
        assert!(matches!(&error, EnrollError::Namespace { path: named, .. } if named == path), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

/// Names of namespaces and numbers of descriptors are given again.
#[test]
fn a_namespace_that_is_held_is_not_looked_for_by_its_name() {
    let (held, other) = (TestNamespace::new(), TestNamespace::new());
    let file = fs::File::open(held.path()).expect("open");
    let meta = file.metadata().expect("stat");
    let id = (meta.dev(), meta.ino());
    let cookie = held.open().cookie();
    let renamed = PodNamespace::held(file.try_clone().expect("clone"), id, Some(other.path()));
    assert_eq!(Netns::of(&renamed).expect("held").cookie(), cookie);
    // Its last name is gone as well.
    drop(held);
    let nameless = PodNamespace::held(file, id, None);
    assert_eq!(nameless.to_string(), format!("net:[{}]", id.1));
    assert_eq!(Netns::of(&nameless).expect("held").cookie(), cookie);
    assert_ne!(renamed, nameless);
    let looked_for = PodNamespace::at(other.path());
    assert_eq!(Netns::of(&looked_for).expect("found").cookie(), other.open().cookie());
    assert_ne!(renamed, looked_for);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn code_runs_in_its_own_namespace_and_no_other() {
    let here = cookie_here();
    let namespaces: Vec<_> = (0..4).map(|_| TestNamespace::new()).collect();
    let opened: Vec<_> = namespaces.iter().map(TestNamespace::open).collect();
    for (namespace, netns) in namespaces.iter().zip(&opened) {
        assert_eq!(netns.path(), namespace.path());
        assert_eq!(netns.inode(), fs::metadata(namespace.path()).expect("stat").ino());
        assert_ne!(netns.cookie(), here);
    }
    assert_eq!(opened.iter().map(|netns| netns.cookie()).collect::<HashSet<_>>().len(), 4);
    let runs = (0..400).map(|number| {
        let netns = Arc::clone(&opened[number % 4]);
        tokio::spawn(async move { assert_eq!(netns.run(cookie_here).await, netns.cookie()) })
    });
    for run in runs.collect::<Vec<_>>() {
        run.await.expect("right namespace");
    }
    assert_eq!(cookie_here(), here);
}

#[tokio::test]
async fn a_panic_reaches_the_caller_and_the_workers_live_on() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    for _ in 0..8 {
        let error = netns.try_run(|| panic!("no {}", "luck")).await.expect_err("panicked");
        assert!(error.to_string().contains("panicked: no luck"), "{error}");
    }
    let caller = Arc::clone(&netns);
    let failed = tokio::spawn(async move { caller.run(|| panic!("out of luck")).await }).await.expect_err("panicked");
    assert!(failed.is_panic());
    assert_eq!(netns.run(cookie_here).await, netns.cookie());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_pod_holds_up_itself_only() {
    let (slow, other) = (TestNamespace::new(), TestNamespace::new());
    let workers = Workers::start().expect("workers");
    let (slow, other) = (slow.open_apart(workers), other.open_apart(workers));
    let (release, blocked) = mpsc::channel::<()>();
    let blocked = Arc::new(std::sync::Mutex::new(blocked));
    let jobs: Vec<_> = (0..8)
        .map(|_| {
            let (slow, blocked) = (Arc::clone(&slow), Arc::clone(&blocked));
            tokio::spawn(async move { slow.run(move || blocked.lock().expect("lock").recv().is_ok()).await })
        })
        .collect();
    for _ in 0..20 {
        let cookie = tokio::time::timeout(*PATIENCE, other.run(cookie_here)).await.expect("not held up");
        assert_eq!(cookie, other.cookie());
    }
    assert!(jobs.iter().all(|job| !job.is_finished()));
    for _ in &jobs {
        release.send(()).expect("jobs wait");
    }
    for job in jobs {
        assert!(tokio::time::timeout(*PATIENCE, job).await.expect("released").expect("no panic"));
    }
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_the_namespace_usable() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let (release, blocked) = mpsc::channel::<()>();
    let run = netns.run(move || blocked.recv());
    assert!(tokio::time::timeout(Duration::from_millis(20), run).await.is_err());
    release.send(()).expect("the job goes on");
    let cookie = tokio::time::timeout(*PATIENCE, netns.run(cookie_here)).await.expect("turn given back");
    assert_eq!(cookie, netns.cookie());
}

#[tokio::test]
async fn an_idle_worker_does_not_keep_a_namespace_alive() {
    let (pod, client) = pod_and_client();
    let client = (client.open(), client);
    let mut watch = interfaces::watch(&client.0).await.expect("watch");
    let Some(Change::New(eth0)) = watch.next().await else { panic!("eth0 is there") };
    let netns = pod.open_apart(Workers::start().expect("workers"));
    netns.run(cookie_here).await;
    drop((netns, pod));
    // The other end of the pod's interface goes when the kernel really ends the namespace.
    let change = tokio::time::timeout(*PATIENCE, watch.next()).await.expect("the namespace ended");
    assert_eq!(change, Some(Change::Gone(eth0.index)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_costs_far_less_than_a_handshake() {
    const RUNS: u32 = 2000;
    let (first, second) = (TestNamespace::new(), TestNamespace::new());
    let workers = Workers::start().expect("workers");
    let (first, second) = (first.open_apart(workers), second.open_apart(workers));
    let started = Instant::now();
    for _ in 0..RUNS {
        first.run(|| ()).await;
    }
    let same = started.elapsed() / RUNS;
    let started = Instant::now();
    for _ in 0..RUNS / 2 {
        first.run(|| ()).await;
        second.run(|| ()).await;
    }
    let alternating = started.elapsed() / RUNS;
    println!("Netns::run: {same:?} in one namespace, {alternating:?} between two");
    // About 1 ms is what a TLS handshake costs; the machine may be busy.
    let most = patience(Duration::from_millis(2));
    assert!(same < most && alternating < most, "{same:?} {alternating:?}");
}
