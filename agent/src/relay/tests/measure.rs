//! What the relay costs. Run with `cargo test --release -p underpass --lib relay::tests::measure -- --ignored --nocapture`.

#![expect(clippy::cast_precision_loss, reason = "figures for people")]

use std::{
    fs,
    io::Write,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::*;

const PHASE: Duration = Duration::from_secs(4);

/// Thread numbers of all relay threads of this process.
fn relay_threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc");
    let names = tasks.map(|task| task.expect("a task").file_name().into_string().expect("a number"));
    let is_relay = |tid: &String| {
        fs::read_to_string(format!("/proc/self/task/{tid}/comm")).is_ok_and(|name| name.starts_with("relay-"))
    };
    names.filter(is_relay).collect()
}

/// CPU time the relay threads have used.
fn cpu() -> Duration {
    let used = |tid: &String| -> u64 {
        let stat = fs::read_to_string(format!("/proc/self/task/{tid}/schedstat")).expect("schedstat");
        stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds")
    };
    Duration::from_nanos(relay_threads().iter().map(used).sum())
}

/// `strace -c` on the relay threads only, so that the applications keep their pace.
fn strace() -> Child {
    let mut command = Command::new("strace");
    command.args(["-c", "-q"]);
    for tid in relay_threads() {
        command.args(["-p", &tid]);
    }
    let child = command.stderr(Stdio::piped()).spawn().expect("strace");
    let traced = || {
        relay_threads().iter().all(|tid| {
            let status = fs::read_to_string(format!("/proc/self/task/{tid}/status")).expect("status");
            status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() != "0"))
        })
    };
    eventually("strace's arrival", traced);
    child
}

/// Calls per system call.
fn finish(child: Child) -> Vec<(String, u64)> {
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).expect("SIGINT");
    let output = child.wait_with_output().expect("strace");
    let table = String::from_utf8(output.stderr).expect("text");
    let row = |line: &str| {
        let columns: Vec<_> = line.split_whitespace().collect();
        Some((columns.last()?.to_string(), columns.get(3)?.parse().ok()?))
    };
    table.lines().filter_map(row).filter(|(name, _)| name != "total").collect()
}

/// Runs `work` until told to stop and reports the costs per `unit` of what `done` counts.
fn measure(name: &str, unit: &str, done: &dyn Fn() -> f64) {
    let (start, used, before) = (Instant::now(), cpu(), done());
    thread::sleep(PHASE);
    let (count, time) = (done() - before, start.elapsed());
    let each = cpu().saturating_sub(used).as_secs_f64() * 1e6 / count;
    eprintln!("{name}: {:.0} {unit}/s, {each:.2} µs of relay CPU per {unit}", count / time.as_secs_f64());
    let (tracer, before) = (strace(), done());
    thread::sleep(PHASE);
    let count = done() - before;
    for (call, calls) in finish(tracer) {
        eprintln!("    {call:<12} {:.3} per {unit}", calls as f64 / count);
    }
}

#[test]
#[ignore = "a measurement, not a test"]
fn costs() {
    for tunnel in [true, false] {
        let node = Node::new();
        let far = Node::new();
        let kind = if tunnel { "tunnel, both relays" } else { "plain" };
        let make = || if tunnel { tunnelled(&node, &far) } else { plain(&node) };
        let stop = Arc::new(AtomicBool::new(false));

        let ends = make();
        let (mut client, mut server, stopped) = (ends.client, ends.server, Arc::clone(&stop));
        let writer = thread::spawn(move || {
            let data = vec![1; 256 << 10];
            while !stopped.load(Relaxed) {
                client.write_all(&data).expect("sending");
            }
        });
        let reader = thread::spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            while server.read(&mut buffer).is_ok_and(|read| read > 0) {}
        });
        let last = ends.relayed.last().expect("a relay");
        let counter = if tunnel { &last.connection.received } else { &last.connection.sent };
        let moved = || counter.load(Relaxed) as f64 / f64::from(1 << 20);
        measure(&format!("bulk, {kind}"), "MiB", &moved);
        stop.store(true, Relaxed);
        writer.join().expect("the writer");
        node.relay.shutdown();
        reader.join().expect("the reader");
    }
    for tunnel in [true, false] {
        let (node, far) = (Node::new(), Node::new());
        let kind = if tunnel { "tunnel, both relays" } else { "plain" };
        let ends = if tunnel { tunnelled(&node, &far) } else { plain(&node) };
        let trips = Arc::new(AtomicU64::new(0));
        let (mut client, mut server, counter) = (ends.client, ends.server, Arc::clone(&trips));
        let echo = thread::spawn(move || {
            let mut buffer = [0; 1024];
            while server.read_exact(&mut buffer).is_ok() && server.write_all(&buffer).is_ok() {}
        });
        let asker = thread::spawn(move || {
            let mut buffer = [0; 1024];
            while client.write_all(&buffer).is_ok() && client.read_exact(&mut buffer).is_ok() {
                counter.fetch_add(1, Relaxed);
            }
        });
        measure(&format!("1 KiB round trips, {kind}"), "trip", &|| trips.load(Relaxed) as f64);
        node.relay.shutdown();
        echo.join().expect("the server");
        asker.join().expect("the client");
    }
}
