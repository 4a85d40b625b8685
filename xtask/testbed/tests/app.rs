//! `testbed-app` without an agent in between: what its commands report in good and in bad cases.

use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use testbed::{Pod, Process, Testbed};

const SOON: Duration = Duration::from_secs(20);

struct Pair {
    _testbed: Testbed,
    client: Pod,
    server: Pod,
}

fn pair(label: &str) -> Result<Pair> {
    let testbed = Testbed::new(label)?;
    let (client, server) = (testbed.node("a").pod("client")?, testbed.node("b").pod("server")?);
    Ok(Pair { _testbed: testbed, client, server })
}

impl Pair {
    /// A server in mode `mode` on port 9000, ready.
    fn serve(&self, mode: &str) -> Result<Process> {
        let process = self.server.app(&["serve", "[::]:9000", "--mode", mode, "--print"])?;
        process.wait_json("listening", SOON)?;
        Ok(process)
    }

    /// Runs a client command against it, IPv4.
    fn ask(&self, command: &str, arguments: &[&str]) -> Result<Value> {
        let address = format!("{}:9000", self.server.ipv4());
        self.client.app_json(&[&[command, address.as_str()], arguments].concat())
    }
}

#[test]
fn echo_in_every_address_form() -> Result<()> {
    let pair = pair("echo")?;
    let server = pair.serve("echo")?;
    let (v4, v6) = (pair.server.ipv4(), pair.server.ipv6());
    for address in [format!("{v4}:9000"), format!("[{v6}]:9000"), format!("[::ffff:{v4}]:9000")] {
        let report = pair.client.app_json(&["connect", &address, "--send", "hello", "--read"])?;
        assert_eq!(report["received"], "hello", "{report}");
        assert_eq!(report["peer"], *address, "{report}");
    }
    let seen = server.wait_json("peer", SOON)?;
    assert!(seen["peer"].as_str().is_some_and(|peer| peer.contains(&pair.client.ipv4().to_string())), "{seen}");
    Ok(())
}

#[test]
fn socket_options() -> Result<()> {
    let pair = pair("options")?;
    let _server = pair.serve("echo")?;
    let own = pair.client.ipv4().to_string();
    for options in [["--mark", "0x539", "--read"].as_slice(), &["--bind", &own, "--read"], &["--mptcp", "--read"]] {
        let report = pair.ask("connect", options)?;
        assert!(report["local"].as_str().is_some_and(|local| local.starts_with(&own)), "{options:?}: {report}");
    }
    assert_eq!(pair.ask("connect", &["--bind", "203.0.113.1"])?["error"], "EADDRNOTAVAIL");
    Ok(())
}

#[test]
fn bulk_and_half_close_are_checked() -> Result<()> {
    let pair = pair("bulk")?;
    let server = pair.serve("bulk")?;
    let report = pair.ask("bulk", &["--up", "20000000", "--down", "30000001", "--seed", "7"])?;
    assert_eq!((&report["up"], &report["down"]), (&20_000_000.into(), &30_000_001.into()), "{report}");
    let slow = pair.ask("bulk", &["--up", "0", "--down", "1000000", "--chunk", "50000", "--pause-ms", "5"])?;
    assert!(slow["seconds"].as_f64().is_some_and(|s| s > 0.09), "{slow}");
    drop(server);
    let server = pair.serve("digest")?;
    assert_eq!(pair.ask("half-close", &["--bytes", "1234567"])?["bytes"], 1_234_567);
    drop(server);
    // An echo is not what was agreed on: the check is a real one.
    let _server = pair.serve("echo")?;
    assert_eq!(pair.ask("bulk", &["--up", "1000", "--down", "1000"])?["error"], "other");
    assert_eq!(pair.ask("half-close", &[])?["error"], "other");
    Ok(())
}

#[test]
fn greeting_request_and_many() -> Result<()> {
    let pair = pair("many")?;
    let server = pair.serve("banner")?;
    assert_eq!(pair.ask("greeting", &[])?["greeting"], "hello");
    drop(server);
    let server = pair.serve("echo")?;
    assert!(pair.ask("request", &["--count", "3"])?["first_answer_ms"].is_f64());
    let report = pair.ask("parallel", &["--count", "500", "--concurrency", "50"])?;
    assert_eq!((&report["ok"], &report["failed"]), (&500.into(), &0.into()), "{report}");

    let address = format!("{}:9000", pair.server.ipv4());
    let mut hold = pair.client.app(&["hold", &address, "--count", "300", "--exchange"])?;
    assert_eq!(hold.wait_json("held", SOON)?["held"], 300);
    hold.close_stdin();
    assert_eq!(hold.wait_json("alive", SOON)?["alive"], 300);
    let hold = pair.client.app(&["hold", &address, "--count", "20", "--send-hex", "00ff"])?;
    assert_eq!(hold.wait_json("held", SOON)?["held"], 20);
    drop(server);
    assert_eq!(hold.output(SOON)?.last_json()?["dead"], 20);
    Ok(())
}

#[test]
fn resets_are_told_from_ends() -> Result<()> {
    let pair = pair("reset")?;
    assert_eq!(pair.ask("connect", &[])?["error"], "ECONNREFUSED");
    let server = pair.serve("reset")?;
    assert_eq!(pair.ask("connect", &["--send", "x", "--read"])?["error"], "ECONNRESET");
    drop(server);
    let server = pair.serve("close")?;
    assert_eq!(pair.ask("connect", &["--read"])?["received"], "");
    drop(server);
    let server = pair.serve("silent")?;
    assert_eq!(pair.ask("connect", &["--read", "--timeout", "1"])?["error"], "timeout");
    drop(server);

    let server = pair.serve("echo")?;
    assert_eq!(pair.ask("reset", &[])?["reset"], true);
    assert!(server.wait_line("ECONNRESET", SOON).is_ok());
    let address = format!("{}:9000", pair.server.ipv4());
    let waiting = pair.client.app(&["expect-reset", &address])?;
    waiting.wait_json("established", SOON)?;
    // A killed server ends its connections cleanly: not a reset.
    drop(server);
    let output = waiting.output(SOON)?;
    assert!(!output.status.success());
    assert_eq!(output.last_json()?["error"], "other");
    Ok(())
}

#[test]
fn expect_reset_accepts_a_reset() -> Result<()> {
    let pair = pair("rst")?;
    // Answers one line and then resets, from inside the server's pod.
    let listener = pair.server.enter(|| std::net::TcpListener::bind((pair.server.ipv4(), 9000)))??;
    let address = format!("{}:9000", pair.server.ipv4());
    let waiting = pair.client.app(&["expect-reset", &address])?;
    let (mut stream, _) = listener.accept()?;
    let mut line = [0; 17];
    std::io::Read::read_exact(&mut stream, &mut line)?;
    std::io::Write::write_all(&mut stream, &line)?;
    waiting.wait_json("established", SOON)?;
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    drop(stream);
    let output = waiting.output(SOON)?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.last_json()?["end"], "ECONNRESET");
    Ok(())
}

#[test]
fn udp_there_and_back() -> Result<()> {
    let pair = pair("udp")?;
    let server = pair.server.app(&["udp-serve", "[::]:9000"])?;
    server.wait_json("listening", SOON)?;
    assert_eq!(pair.ask("udp", &[])?["peer"], format!("{}:9000", pair.server.ipv4()));
    drop(server);
    assert_eq!(pair.ask("udp", &[])?["error"], "ECONNREFUSED");
    Ok(())
}
