//! Tests of finding a pod's processes and their cgroups.

use std::{
    fs::{create_dir, remove_dir},
    io::Read,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use super::*;
use crate::capture::netns::tests::TestNamespace;

/// A cgroup v2 directory; removed when dropped, after its processes.
struct TestCgroup(PathBuf);

impl TestCgroup {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
        let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let mount = mount.into_iter().find(|fields| fields[2] == "cgroup2").expect("cgroup v2 is mounted");
        let mount = Path::new(mount[1]);
        Self::at(mount.join(format!("up-t{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))))
    }

    fn at(path: PathBuf) -> Self {
        create_dir(&path).expect("cgroup directory; these tests need root");
        Self(path)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = remove_dir(&self.0);
    }
}

/// A process in a namespace and a cgroup; killed when dropped.
struct TestProcess(Child);

impl TestProcess {
    fn new(namespace: &TestNamespace, cgroup: Option<&Path>) -> Self {
        // Writing 0 moves the writer.
        let enter = cgroup
            .map_or_else(String::new, |cgroup| format!("echo 0 > '{}' && ", cgroup.join("cgroup.procs").display()));
        // Not `ip netns exec`, which mounts another /sys.
        let mut child = Command::new("nsenter")
            .arg(format!("--net={}", namespace.path().display()))
            .args(["sh", "-c", &format!("{enter}echo && exec sleep 60 >/dev/null")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nsenter");
        // The shell's line, then the end of its pipe when it has become `sleep`.
        let mut said = String::new();
        child.stdout.take().expect("piped").read_to_string(&mut said).expect("read");
        assert_eq!(said, "\n", "the process is where it should be");
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn processes_at_and_below_the_attach_point_are_fine() {
    let (namespace, elsewhere) = (TestNamespace::new(), TestNamespace::new());
    let netns = namespace.open();
    let attach = TestCgroup::new();
    let child = TestCgroup::at(attach.0.join("pod"));
    check_below(&Census::default(), &netns, &attach.0).await.expect("nobody there");
    let _at = TestProcess::new(&namespace, Some(&attach.0));
    let _below = TestProcess::new(&namespace, Some(&child.0));
    let _other = TestProcess::new(&elsewhere, None);
    check_below(&Census::default(), &netns, &attach.0).await.expect("all below");
    // A worker of the agent inside the namespace is no process of the pod.
    netns.run(|| ()).await;
    check_below(&Census::default(), &netns, &attach.0).await.expect("all below");
}

#[tokio::test]
async fn a_process_outside_is_named() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let attach = TestCgroup::new();
    // Shares the beginning of its name, not its place.
    let beside = TestCgroup::at(attach.0.with_file_name(format!("{}x", attach.0.file_name().expect("name").display())));
    let _inside = TestProcess::new(&namespace, Some(&attach.0));
    let outside = TestProcess::new(&namespace, Some(&beside.0));
    let error = check_below(&Census::default(), &netns, &attach.0).await.expect_err("outside");
    let EnrollError::OutsideCgroup { pid, command, cgroup, attach: named } = &error else { panic!("{error}") };
    assert_eq!((*pid, command.as_str(), named), (outside.pid(), "sleep", &attach.0));
    assert!(cgroup.ends_with('x'), "{cgroup}");
    drop(outside);
    check_below(&Census::default(), &netns, &attach.0).await.expect("it is gone");
}

#[tokio::test]
async fn proc_is_gone_through_once_for_all_who_ask_meanwhile() {
    let census = Census::default();
    let takers = (0..5).map(async |_| census.take().await.expect("/proc can be read"));
    let taken = futures_util::future::join_all(takers).await;
    // The others had asked after the first one had begun.
    assert!(!Arc::ptr_eq(&taken[0], &taken[1]));
    assert!(taken[1..].iter().all(|other| Arc::ptr_eq(&taken[1], other)));
    assert!(census.latest.lock().await.is_none(), "nobody keeps it");

    // Whoever asks later sees what has happened since.
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let child = TestProcess::new(&namespace, None);
    assert_eq!(census.take().await.expect("/proc can be read")[&netns.id()], [child.pid()]);
}

#[tokio::test]
async fn an_attach_point_that_is_none_is_refused() {
    let namespace = TestNamespace::new();
    let netns = namespace.open();
    let error = check_below(&Census::default(), &netns, Path::new("/proc")).await.expect_err("not a cgroup");
    assert!(error.to_string().contains("/proc is not on a cgroup v2 file system"), "{error}");
    let error = check_below(&Census::default(), &netns, Path::new("/sys/fs/cgroup/no/such/cgroup"))
        .await
        .expect_err("not there");
    assert!(error.to_string().contains("/sys/fs/cgroup/no/such/cgroup: No such file"), "{error}");
}

#[test]
fn cgroup_paths_are_read_in_every_hierarchy() {
    assert_eq!(v2_path("0::/kubepods/pod1\n"), Some("/kubepods/pod1"));
    assert_eq!(v2_path("8:pids:/a\n4:memory:/b\n0::/c\n"), Some("/c"));
    assert_eq!(v2_path("0::/c (deleted)\n"), Some("/c"));
    assert_eq!(v2_path("8:pids:/a\n"), None);
}
