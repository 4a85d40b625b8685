//! `underpass self-test`: a pod that sees for itself that it is in the mesh.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, Uri, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use procfs::net::{TcpNetEntry, TcpState, tcp, tcp6};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, lookup_host},
    time::{sleep, timeout},
};

use underpass_abi::TUNNEL_PORT;

use super::exit::EXIT_CODES;

/// One step: a name, a connection, an answer.
const STEP: Duration = Duration::from_secs(5);
/// Pause after an attempt that failed.
const AGAIN: Duration = Duration::from_millis(500);
/// Longest page of metrics that is read, in bytes.
const MAX_PAGE: usize = 64 * 1024 * 1024;
/// Counts connections by both ends (Istio's standard metrics).
const OPENED: &str = "istio_tcp_connections_opened_total";

/// Arguments of `underpass self-test`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

`helm test` runs this in a pod of the mesh. It answers on its own port, dials its own Service until it gets its own answer, and
then looks among the pod's connections for the tunnel that carried the answer: port 15008 takes nothing but mutual TLS. Where
the agents' metrics can be reached from pods, --metrics asks the agent as well. It needs no rights.

Examples:
  underpass self-test --service web.shop.svc:8080 --listen [::]:8080
  underpass self-test --service web.shop.svc:8080 --metrics http://192.0.2.1:15020/metrics"))]
pub(super) struct SelfTestArgs {
    /// The Service that leads to this pod: HOST:PORT.
    #[arg(long, value_name = "HOST:PORT")]
    service: String,
    /// Where to answer.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:8080")]
    listen: SocketAddr,
    /// The metrics of this node's agent, where pods can reach them.
    #[arg(long, value_name = "URL", value_parser = url)]
    metrics: Option<Uri>,
    /// How long to try, e.g. 1m.
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// A URL whose host may be an IPv6 address without brackets: Kubernetes fills addresses in as they are.
fn url(text: &str) -> Result<Uri, String> {
    let wrong = || "write http://HOST:PORT/PATH".to_owned();
    let rest = text.strip_prefix("http://").ok_or_else(wrong)?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let uri = match authority.rsplit_once(':') {
        Some((host, port)) if host.contains(':') && !host.starts_with('[') => format!("http://[{host}]:{port}/{path}"),
        _ => text.to_owned(),
    };
    uri.parse().map_err(|e| format!("{e}; {}", wrong()))
}

/// Runs it.
pub(super) fn self_test(args: &SelfTestArgs) -> anyhow::Result<()> {
    super::runtime::small()?.block_on(test(args))
}

async fn test(args: &SelfTestArgs) -> anyhow::Result<()> {
    let (host, port) = args
        .service
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host.to_owned(), port.parse::<u16>().ok()?)))
        .with_context(|| format!("--service: {:?}: write HOST:PORT", args.service))?;
    let listener = crate::admin::http::bind(args.listen).await.with_context(|| format!("--listen {}", args.listen))?;
    // Another pod's answer is not this one's.
    let answer = format!("{:016x}", rand::random::<u64>());
    tokio::spawn(serve(listener, answer.clone()));
    let end = Instant::now() + args.timeout;
    until(end, async || dial(&host, port, &answer).await)
        .await
        .with_context(|| format!("dialling {} does not lead here", args.service))?;
    println!("{} leads here", args.service);
    until(end, async || {
        dial(&host, port, &answer).await?;
        ensure!(
            has_dialled(TUNNEL_PORT)?,
            "no connection of this pod goes through a tunnel (port {TUNNEL_PORT}); is this pod enrolled (`underpass workloads` on its node)?"
        );
        Ok(())
    })
    .await?;
    println!("a tunnel of the mesh carried it");
    let Some(metrics) = &args.metrics else { return Ok(()) };
    until(end, async || {
        dial(&host, port, &answer).await?;
        let page = page(metrics).await.with_context(|| format!("reading {metrics}"))?;
        let service = host.strip_suffix('.').unwrap_or(&host);
        ensure!(
            mutual(&page, service),
            "the agent counts no connection to {service} with mutual TLS; is this pod enrolled (`underpass workloads` on its node)?"
        );
        Ok(())
    })
    .await?;
    println!("the agent of this node carried it with mutual TLS");
    Ok(())
}

/// Is there, or was there a moment ago, a connection from this network namespace to such a port? Only the agent dials tunnels
/// from a pod; an ended connection stays in the tables for a minute.
fn has_dialled(port: u16) -> anyhow::Result<bool> {
    let v4 = tcp().context("reading /proc/net/tcp")?;
    // Without IPv6 there is no such file.
    let v6 = tcp6().unwrap_or_default();
    let dialled = |entry: &TcpNetEntry| entry.state != TcpState::Listen && entry.remote_address.port() == port;
    Ok(v4.iter().chain(&v6).any(dialled))
}

/// Tries until it works or the time is up; the last error then.
async fn until(end: Instant, attempt: impl AsyncFn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    loop {
        match attempt().await {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= end => return Err(error),
            Err(_) => sleep(AGAIN).await,
        }
    }
}

async fn serve(listener: TcpListener, answer: String) {
    loop {
        match listener.accept().await {
            // One line fits into any socket's buffer.
            Ok((mut stream, _)) => drop(stream.write_all(format!("{answer}\n").as_bytes()).await),
            Err(_) => sleep(AGAIN).await,
        }
    }
}

async fn dial(host: &str, port: u16, answer: &str) -> anyhow::Result<()> {
    let found = timeout(STEP, lookup_host((host, port))).await.context("looking up the name takes too long")?;
    let mut last = anyhow::anyhow!("the name has no address");
    for address in found.with_context(|| format!("looking up {host}"))? {
        match timeout(STEP, ask(address)).await.context("no answer in time").flatten() {
            Ok(line) if line.trim_end() == answer => return Ok(()),
            Ok(line) => last = anyhow::anyhow!("{address} answers {line:?}, which is not this pod"),
            Err(error) => last = error.context(format!("dialling {address}")),
        }
    }
    Err(last)
}

async fn ask(address: SocketAddr) -> anyhow::Result<String> {
    let mut line = String::new();
    BufReader::new(TcpStream::connect(address).await?).read_line(&mut line).await?;
    Ok(line)
}

async fn page(from: &Uri) -> anyhow::Result<String> {
    let (Some(host), Some("http")) = (from.host(), from.scheme_str()) else {
        bail!("write http://HOST:PORT/PATH");
    };
    let port = from.port_u16().unwrap_or(80);
    let read = async {
        let stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let path = from.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::get(path).header(header::HOST, host).body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        ensure!(response.status().is_success(), "it answers {}", response.status());
        let body = Limited::new(response.into_body(), MAX_PAGE).collect().await.map_err(|e| anyhow::anyhow!(e))?;
        connection.abort();
        Ok(String::from_utf8_lossy(&body.to_bytes()).into_owned())
    };
    timeout(STEP, read).await.context("no answer in time")?
}

/// Does a sample say that there was a connection to the service with mutual TLS? Services are known by their whole names, and dialled
/// by shorter ones, too.
fn mutual(page: &str, service: &str) -> bool {
    let whole = format!("destination_service=\"{service}");
    page.lines().filter(|line| line.starts_with(OPENED)).any(|line| {
        let named = line.match_indices(&whole).any(|(at, text)| line[at + text.len()..].starts_with(['"', '.']));
        named && line.contains("connection_security_policy=\"mutual_tls\"") && !line.ends_with(" 0")
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::{has_dialled, mutual, url};

    #[test]
    fn a_connection_to_a_port_is_found_and_a_listener_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!has_dialled(port).unwrap());
        let connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert!(has_dialled(port).unwrap());
        drop(connection);
    }

    #[test]
    fn addresses_need_no_brackets() {
        for (text, host) in [
            ("http://192.0.2.1:15020/metrics", "192.0.2.1"),
            ("http://2001:db8::1:15020/metrics", "[2001:db8::1]"),
            ("http://[2001:db8::1]:15020/metrics", "[2001:db8::1]"),
        ] {
            let url = url(text).unwrap();
            assert_eq!((url.host(), url.port_u16(), url.path()), (Some(host), Some(15020), "/metrics"), "{text}");
        }
        for text in ["https://a:1/", "a:1", "http://a b/"] {
            assert!(url(text).is_err(), "{text}");
        }
    }

    #[test]
    fn only_mutual_tls_to_this_service_counts() {
        let line = |service: &str, policy: &str, count: u32| {
            format!(
                "istio_tcp_connections_opened_total{{destination_service=\"{service}\",connection_security_policy=\"{policy}\"}} {count}\n"
            )
        };
        let whole = "web.shop.svc.cluster.local";
        assert!(mutual(&line(whole, "mutual_tls", 1), "web.shop.svc"));
        assert!(mutual(&line(whole, "mutual_tls", 3), whole));
        for page in [
            line(whole, "unknown", 1),
            line(whole, "mutual_tls", 0),
            line("other.shop.svc.cluster.local", "mutual_tls", 1),
            line("web.shop.svcs", "mutual_tls", 1),
            line(whole, "mutual_tls", 1).replace("opened", "closed"),
            String::new(),
        ] {
            assert!(!mutual(&page, "web.shop.svc"), "{page}");
        }
    }
}
