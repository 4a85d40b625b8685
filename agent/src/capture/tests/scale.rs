//! What a pod costs. Run with `--ignored --nocapture`.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use testbed::pace::patience;

use super::{
    lab::{Lab, ip, snapshot},
    workload,
};
use crate::mesh::{MeshSettings, Workload};

const PODS: usize = 200;
/// Enough to keep every processor busy.
const AT_ONCE: usize = 8;

/// Wall and processor time of a step. Only the second means something on a machine that is busy with other things.
struct Step(Instant, Duration);

impl Step {
    fn begin() -> Self {
        Self(Instant::now(), processor_time())
    }

    /// Prints it, and returns the processor time of one pod.
    fn end(self, what: &str) -> Duration {
        let (wall, cpu) = (self.0.elapsed() / PODS as u32, processor_time().saturating_sub(self.1) / PODS as u32);
        println!("{what}: {wall:?} per pod, {cpu:?} of processor time");
        cpu
    }
}

fn processor_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros.try_into().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures; takes a while"]
async fn enrolment_takes_milliseconds() {
    enrolment(true).await;
}

/// What the guard on the node's side costs is the difference.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures; takes a while"]
async fn enrolment_without_an_end_on_the_node_takes_milliseconds() {
    enrolment(false).await;
}

async fn enrolment(on_the_node: bool) {
    let lab = Lab::new();
    let peers = lab.namespace("peers");
    let workloads: Vec<Workload> = (0..PODS)
        .map(|n| {
            let ns = lab.namespace(&format!("p{n}"));
            let device =
                if on_the_node { format!("s{}p{n}", std::process::id()) } else { format!("p{n} netns {peers}") };
            ip(&format!("link add eth0 netns {ns} type veth peer name {device}"));
            workload(&format!("w{n}"), &format!("10.8.{}.{}", n / 250, n % 250 + 1), Some(&format!("/run/netns/{ns}")))
        })
        .collect();
    let started = Instant::now();
    let capture = lab.start().await;
    println!("start: {:?}", started.elapsed());
    capture.apply(&snapshot(MeshSettings::default(), workloads.clone())).unwrap();

    let step = Step::begin();
    for w in &workloads {
        capture.enroll(w, None).await.unwrap();
    }
    let each = step.end("enrol, one after the other");
    let step = Step::begin();
    for w in &workloads {
        capture.enroll(w, None).await.unwrap();
    }
    step.end("enrol again, unchanged");

    drop(capture);
    let started = Instant::now();
    let capture = lab.start().await;
    println!("start again: {:?}", started.elapsed());
    capture.apply(&snapshot(MeshSettings::default(), workloads.clone())).unwrap();
    let step = Step::begin();
    stream::iter(&workloads)
        .for_each_concurrent(AT_ONCE, async |w| {
            capture.enroll(w, None).await.unwrap();
        })
        .await;
    step.end(&format!("adopt, {AT_ONCE} at once"));
    let step = Step::begin();
    for w in &workloads {
        capture.unenroll(&w.key).await;
    }
    step.end("un-enrol");
    // 1,000 pods in 12 s on two processors, by a program that is hardly optimised. Wall time says
    // little: attaching to an interface for the first time waits for two RCU grace periods in the
    // kernel, with the RTNL lock held.
    assert!(each < patience(Duration::from_millis(24)), "{each:?}");
}
