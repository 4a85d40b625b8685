//! Peers that are not who they should be, or do not speak the protocol. Each is refused, with a reason that is counted.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Result, ensure};
use rcgen::{ExtendedKeyUsagePurpose, SanType};
use testbed::{Pod, Process, Stream};

use crate::{
    certificates::{Files, Forge, Leaf, s_client},
    world::{Stage, World, app_error, at, serve, start_agent, wait_counter},
};

const ALPN: &[&str] = &["-alpn", "underpass/1"];

struct Scene {
    rogue: Pod,
    world: World,
    forge: Forge,
}

fn scene(label: &str) -> Result<Scene> {
    let stage = Stage::new(label)?;
    let rogue = stage.bed.node("a").pod("rogue")?;
    let world = stage.start()?;
    let forge = Forge::of(&world.bed)?;
    Ok(Scene { rogue, world, forge })
}

impl Scene {
    /// A client with this certificate: it must be told `alert` and be counted as `reason`.
    fn refused(&self, files: &Files, arguments: &[&str], header: &[u8], reason: &str, alert: &str) -> Result<()> {
        let counter = format!("refused.{reason}");
        let before = crate::world::counter(&self.world.b, &counter)?;
        let mut peer: Process = s_client(&self.rogue, &self.world.server, files, arguments)?;
        // The refusal may come before the header is sent: then there is nobody to read it.
        let _ = peer.write_stdin(header);
        let status = peer.wait(Duration::from_secs(20))?;
        let said = peer.text(Stream::Stderr);
        ensure!(!status.success() || said.contains("alert"), "{reason}: openssl ended well: {said}");
        ensure!(said.contains(alert), "{reason}: expected alert {alert:?}, openssl says: {said}");
        wait_counter(&self.world.b, &counter, before + 1)
    }

    /// A PROXY v2 header over TCP/IPv4, without TLVs.
    fn header(source: Ipv4Addr, destination: Ipv4Addr, port: u16) -> Vec<u8> {
        let mut h = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        h.extend(source.octets());
        h.extend(destination.octets());
        h.extend(40_000_u16.to_be_bytes());
        h.extend(port.to_be_bytes());
        h
    }
}

#[test]
fn a_good_foreign_peer_is_served() -> Result<()> {
    // The control for everything below: openssl with a good certificate and header gets through.
    let s = scene("goodpeer")?;
    let _echo = serve(&s.world.server, 8080, &["--print"])?;
    let files = s.forge.leaf(&Leaf::good("rogue"))?;
    let mut peer = s_client(&s.rogue, &s.world.server, &files, ALPN)?;
    let mut bytes = Scene::header(s.rogue.ipv4(), s.world.server.ipv4(), 8080);
    bytes.extend(b"hello from openssl\n");
    peer.write_stdin(&bytes)?;
    peer.wait_line("hello from openssl", Duration::from_secs(10))?;
    Ok(())
}

#[test]
fn certificates_that_are_not_accepted() -> Result<()> {
    let s = scene("badcert")?;
    let header = Scene::header(s.rogue.ipv4(), s.world.server.ipv4(), 8080);
    let forge = &s.forge;
    let refused = |leaf: &Leaf, reason: &str| s.refused(&forge.leaf(leaf)?, ALPN, &header, reason, "alert");
    refused(&Leaf::uri("spiffe://other.domain/ns/default/sa/rogue"), "wrong-trust-domain")?;
    refused(&Leaf::uri("spiffe://cluster.local/workload/rogue"), "invalid-certificate")?;
    let dns = Leaf { sans: vec![SanType::DnsName("rogue.default".try_into()?)], ..Leaf::good("rogue") };
    refused(&dns, "invalid-certificate")?;
    let mut two = Leaf::good("rogue");
    two.sans.extend(Leaf::good("server").sans);
    refused(&two, "invalid-certificate")?;
    let server_only = Leaf { usages: vec![ExtendedKeyUsagePurpose::ServerAuth], ..Leaf::good("rogue") };
    refused(&server_only, "invalid-certificate")?;
    let expired = Leaf { valid: (-7200, -3600), ..Leaf::good("rogue") };
    refused(&expired, "certificate-expired")?;
    let foreign = Forge::foreign(s.world.bed.dir())?.leaf(&Leaf::good("client"))?;
    s.refused(&foreign, ALPN, &header, "untrusted-issuer", "alert")?;
    Ok(())
}

#[test]
fn peers_without_certificate_alpn_or_tls() -> Result<()> {
    let s = scene("noproto")?;
    let header = Scene::header(s.rogue.ipv4(), s.world.server.ipv4(), 8080);
    let good = s.forge.leaf(&Leaf::good("rogue"))?;
    s.refused(&good, &[], &header, "no-alpn", "alert")?;
    s.refused(&good, &["-alpn", "h2"], &header, "no-alpn", "alert")?;
    let to = at(s.world.server.ipv4(), 15008);
    // No certificate at all.
    let bare = s.rogue.spawn(&["openssl", "s_client", "-connect", &to, "-tls1_3", "-quiet", "-alpn", "underpass/1"])?;
    bare.wait(Duration::from_secs(20))?;
    ensure!(bare.text(Stream::Stderr).contains("certificate required"), "{}", bare.text(Stream::Stderr));
    wait_counter(&s.world.b, "refused.invalid-certificate", 1)?;
    // Plaintext, and garbage that begins like TLS.
    let plain = s.rogue.run(&["curl", "-sS", "-m", "10", &format!("http://{to}/")], Duration::from_secs(20))?;
    ensure!(!plain.status.success(), "{}", plain.stdout);
    wait_counter(&s.world.b, "refused.not-tls", 1)?;
    let before = total_refused(&s.world)?;
    let _ = s
        .rogue
        .app(&["connect", &to, "--send-hex", "16030100050102030405", "--read", "--timeout", "15"])?
        .output(Duration::from_secs(20))?;
    ensure!(total_refused(&s.world)? > before, "garbage was not counted: {}", s.world.b.counters()?);
    Ok(())
}

fn total_refused(world: &World) -> Result<u64> {
    let all = world.b.counters()?;
    Ok(all["agent"]["refused"].as_object().map_or(0, |m| m.values().filter_map(serde_json::Value::as_u64).sum()))
}

#[test]
fn proxy_headers_that_lie() -> Result<()> {
    let s = scene("headers")?;
    let _echo = serve(&s.world.server, 8080, &[])?;
    let good = s.forge.leaf(&Leaf::good("rogue"))?;
    let (me, server, client) = (s.rogue.ipv4(), s.world.server.ipv4(), s.world.client.ipv4());
    let refused = |header: &[u8], reason: &str| s.refused(&good, ALPN, header, reason, "access denied");
    refused(&Scene::header(me, Ipv4Addr::LOCALHOST, 8080), "proxy-destination")?;
    refused(&Scene::header(me, client, 8080), "proxy-destination")?;
    refused(&Scene::header(me, Ipv4Addr::UNSPECIFIED, 8080), "proxy-destination")?;
    for port in [15001, 15006, 15008, 15053, 15101, 0] {
        refused(&Scene::header(me, server, port), "proxy-destination")?;
    }
    refused(&Scene::header(client, server, 8080), "proxy-source")?;
    refused(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "proxy-header")?;
    let mut oversized = Scene::header(me, server, 8080);
    oversized[14..16].copy_from_slice(&60_000_u16.to_be_bytes());
    oversized.extend(std::iter::repeat_n(0, 4000));
    refused(&oversized, "proxy-header")?;
    let mut local = Scene::header(me, server, 8080);
    local[12] = 0x20;
    refused(&local, "proxy-header")
}

#[test]
fn a_truncated_proxy_header_is_refused() -> Result<()> {
    let s = scene("cutshort")?;
    let good = s.forge.leaf(&Leaf::good("rogue"))?;
    let mut peer = s_client(&s.rogue, &s.world.server, &good, &["-alpn", "underpass/1", "-no_ign_eof"])?;
    peer.write_stdin(&Scene::header(s.rogue.ipv4(), s.world.server.ipv4(), 8080)[..20])?;
    peer.close_stdin();
    peer.wait(Duration::from_secs(20))?;
    wait_counter(&s.world.b, "refused.proxy-header", 1)
}

/// The server's agent reads another configuration than the client's: what it proves is not what the client was told.
fn not_believed(label: &str, reason: &str, change: impl FnOnce(&mut testbed::MeshConfig)) -> Result<()> {
    let stage = Stage::new(label)?;
    let _echo = serve(&stage.server, 8080, &[])?;
    let a = start_agent(&stage.mesh, stage.bed.node("a"), &[])?;
    let mut wrong = stage.mesh.clone();
    change(&mut wrong);
    let _b = start_agent(&wrong, stage.bed.node("b"), &[])?;
    let error = app_error(&stage.client, &["request", &at(stage.server.ipv4(), 8080)])?;
    ensure!(error == "ECONNRESET", "{error}");
    wait_counter(&a, &format!("refused.{reason}"), 1)?;
    ensure!(a.log().contains(reason), "{}", a.log());
    Ok(())
}

#[test]
fn a_server_with_another_identity_than_the_address_has_is_not_believed() -> Result<()> {
    not_believed("imposter", "wrong-identity", |m| m.workload("server").service_account = "imposter".into())
}

#[test]
fn a_server_of_another_trust_domain_is_not_believed() -> Result<()> {
    not_believed("othertd", "wrong-trust-domain", |m| m.trust_domain = "other.domain".into())
}
