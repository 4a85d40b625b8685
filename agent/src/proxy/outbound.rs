//! A connection an enrolled pod makes: from the captured socket to the relay.

use std::{
    io::Read as _,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use socket2::SockRef;
use tokio::net::TcpStream;
use tracing::debug;

use super::{
    Holder, PodContext,
    accept::{full, reset},
    awaiting, dial,
    observe::Refused,
    route::{Plan, Target},
};
use crate::{
    bounds::{Evicted, Place},
    relay::{DataPath, Direction, NewConnection, Upstream},
    sys::tcp,
    telemetry::{RefusalReason, Reporter, TraceId},
    tunnel::{TunnelError, handshake, native, records::MAX_PLAINTEXT},
};

/// Why a connection went nowhere.
struct Refusal {
    reason: RefusalReason,
    detail: String,
    /// The application's first bytes went with it, so that nobody else may have them.
    spent: bool,
}

impl Refusal {
    fn new(reason: RefusalReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), spent: false }
    }
}

/// A connection made.
struct Connected {
    upstream: Upstream,
    target: Target,
    /// Bytes of the application's that have been sent.
    early: usize,
}

impl From<TunnelError> for Refusal {
    fn from(e: TunnelError) -> Self {
        Self::new(e.reason(), e.to_string())
    }
}

/// Carries one captured connection; a refusal is a reset at the application.
pub(super) async fn serve(context: &PodContext, app: TcpStream, client: SocketAddr) {
    let counters = &context.proxy.counters;
    let Some(destination) = original_destination(context, &app, client) else {
        counters.refuse(RefusalReason::NoOriginalDestination);
        debug!(pod = %context.pod.key, %client, "reset: nobody's connect() was captured for this connection");
        return reset(app);
    };
    let Some(place) = context.outbound.try_enter(Holder::Address(destination.ip().to_canonical())) else {
        return full(context, app, client);
    };
    let trace = TraceId(rand::random());
    let result = if let Some(why) = context.pod.kept() {
        Err(Refusal::new(RefusalReason::KeptPod, why.to_string()))
    } else {
        match awaiting::plan(&context.proxy.mesh, destination, context.proxy.limits.handshake).await {
            Ok(plan) => connect_first(context, &plan, &app, client, trace).await.map(|connected| (connected, plan)),
            Err((reason, detail)) => Err(Refusal::new(reason, detail)),
        }
    };
    match result {
        Ok((connected, plan)) => hand_over(context, app, client, destination, connected, plan, trace, place),
        Err(Refusal { reason, detail, .. }) => {
            context.refused(&Refused {
                direction: Direction::Outbound,
                reason,
                detail: &detail,
                source: client,
                destination: Some(destination),
                identity: None,
                service: None,
                trace: Some(trace),
            });
            reset(app);
        }
    }
}

fn original_destination(context: &PodContext, app: &TcpStream, client: SocketAddr) -> Option<SocketAddr> {
    let listener = app.local_addr().ok()?;
    // The wildcard listener also sees what was not sent over loopback; only the hooks' rewritten addresses count.
    if !listener.ip().to_canonical().is_loopback() {
        return None;
    }
    context.proxy.capture.take_original_destination(&context.pod, client, listener)
}

/// Tries the plan's targets in order. Nothing of the application's is read before a peer has proved itself, and after that there is no second try.
async fn connect_first(
    context: &PodContext,
    plan: &Plan,
    app: &TcpStream,
    client: SocketAddr,
    trace: TraceId,
) -> Result<Connected, Refusal> {
    let mut last = Refusal::new(RefusalReason::NoEndpoint, "no endpoint");
    for (i, target) in plan.targets.iter().enumerate() {
        if i > 0 {
            context.proxy.counters.retries.fetch_add(1, Relaxed);
        }
        match connect(context, plan, target, app, client, trace).await {
            Ok((upstream, early)) => return Ok(Connected { upstream, target: target.clone(), early }),
            Err(e) if e.spent => return Err(e),
            Err(e) => {
                debug!(pod = %context.pod.key, ?target, reason = %e.reason, detail = %e.detail, "target failed");
                last = e;
            }
        }
    }
    Err(last)
}

async fn connect(
    context: &PodContext,
    plan: &Plan,
    target: &Target,
    app: &TcpStream,
    client: SocketAddr,
    trace: TraceId,
) -> Result<(Upstream, usize), Refusal> {
    let limits = &context.proxy.limits;
    let pod = &context.pod;
    let unreachable = |to: SocketAddr| {
        move |e: std::io::Error| Refusal::new(RefusalReason::UpstreamUnreachable, format!("connecting to {to}: {e}"))
    };
    let crowded = |to: SocketAddr| {
        let detail = format!("{to} has not answered anybody for {:?}, and many wait for it", limits.connect);
        Refusal::new(RefusalReason::UpstreamUnreachable, detail)
    };
    match target {
        Target::Plain(to) => {
            let protected = || Refusal::new(RefusalReason::PlaintextToMesh, format!("{to} is in the mesh"));
            let allowed = || context.proxy.mesh.load().allows_plaintext(&pod.key, *to);
            if !allowed() {
                return Err(protected());
            }
            let lane = context.lanes.to(*to);
            let turn = lane.turn(limits.connect).await.ok_or_else(|| crowded(*to))?;
            let stream =
                dial::upstream(pod, bound_source(client, *to), *to, limits.connect).await.map_err(unreachable(*to))?;
            turn.got_through();
            // The address may have become one of the mesh while nobody answered there.
            if !allowed() {
                return Err(protected());
            }
            let io = |e: std::io::Error| Refusal::new(RefusalReason::Resources, format!("leaving the reactor: {e}"));
            Ok((Upstream::Plain(stream.into_std().map_err(io)?.into()), 0))
        }
        Target::Tunnel { identity, destination } => {
            if context.proxy.certificates.wait_for(&pod.identity, limits.handshake).await.is_none() {
                return Err(Refusal::new(
                    RefusalReason::NoCertificate,
                    format!("{} has no valid certificate", pod.identity),
                ));
            }
            let to = SocketAddr::new(destination.ip(), underpass_abi::TUNNEL_PORT);
            let lane = context.lanes.to(to);
            let turn = lane.turn(limits.connect).await.ok_or_else(|| crowded(to))?;
            let from = bound_source(client, to);
            let stream = dial::upstream(pod, from, to, limits.connect).await.map_err(unreachable(to))?;
            let source_ip = stream.local_addr().map_err(unreachable(to))?.ip();
            let preamble = native::Preamble {
                source: SocketAddr::new(source_ip, client.port()),
                destination: *destination,
                authority: plan.service.as_deref().map(ToOwned::to_owned),
                unique_id: Some(trace.0.to_vec()),
            };
            let began = Instant::now();
            let mut early = 0;
            let first = || {
                let mut bytes = native::encode(&preamble);
                early = append_early(app, &mut bytes);
                bytes
            };
            let establish = async {
                let tls = &context.proxy.tls;
                let session = handshake::connect(stream, tls, &pod.identity, identity, first).await?;
                context.proxy.telemetry.handshakes.of(Reporter::Source).observe(began.elapsed().as_secs_f64());
                session.offload(tls.ktls()).await
            };
            let mut entry = context.dials.enter(&to).await;
            let established = {
                // Boxed, so that a connection that waits for its turn is small.
                let mut establish = Box::pin(turn.run(limits.handshake, establish));
                entry.guard(establish.as_mut()).await
            };
            let refusal = match established {
                Ok(Some(Ok(tunnel))) => {
                    turn.got_through();
                    return Ok((Upstream::Tunnel(Box::new(tunnel)), early));
                }
                Ok(Some(Err(e))) => e.into(),
                Err(Evicted) => Refusal::new(RefusalReason::PodLimit, format!("handshake with {to}: {Evicted}")),
                Ok(None) => {
                    let detail = format!("no handshake with {to} within {:?}", limits.handshake);
                    Refusal::new(RefusalReason::Deadline, detail)
                }
            };
            Err(Refusal { spent: early > 0, ..refusal })
        }
    }
}

/// Appends what the application has sent by now, as far as it fits one record, so that it leaves together with the header. How many bytes that were.
///
/// Only bytes known to be there are asked for: an end or an error is for the relay to meet.
fn append_early(app: &TcpStream, bytes: &mut Vec<u8>) -> usize {
    let header = bytes.len();
    let there = tcp::available(app.as_fd()).map_or(0, |there| there as usize).min(MAX_PLAINTEXT.saturating_sub(header));
    if there == 0 {
        return 0;
    }
    bytes.resize(header + there, 0);
    let mut socket = &*SockRef::from(app);
    let taken = socket.read(&mut bytes[header..]).unwrap_or(0);
    bytes.truncate(header + taken);
    taken
}

/// The address the application bound before it connected, if it did: a captured connection otherwise comes from loopback.
fn bound_source(client: SocketAddr, to: SocketAddr) -> Option<IpAddr> {
    let ip = client.ip().to_canonical();
    (!ip.is_loopback() && ip.is_ipv4() == to.is_ipv4()).then_some(ip)
}

#[expect(clippy::too_many_arguments, reason = "the one place where everything known about a connection comes together")]
fn hand_over(
    context: &PodContext,
    app: TcpStream,
    client: SocketAddr,
    destination: SocketAddr,
    connected: Connected,
    plan: Plan,
    trace: TraceId,
    place: Place<Holder>,
) {
    let Connected { upstream, target, early } = connected;
    let (peer, to) = match target {
        Target::Tunnel { identity, destination } => {
            (Some(identity), SocketAddr::new(destination.ip(), underpass_abi::TUNNEL_PORT))
        }
        Target::Plain(to) => (None, to),
    };
    let (data_path, fallback, cipher, resumed) = match &upstream {
        Upstream::Tunnel(s) => (DataPath::of(s.fallback()), s.fallback(), Some(s.info.cipher), s.info.resumed),
        Upstream::Plain(_) => (DataPath::Plain, None, None, false),
    };
    let chain = match &upstream {
        Upstream::Tunnel(tunnel) => Some(Arc::clone(&tunnel.info.chain)),
        Upstream::Plain(_) => None,
    };
    let new = NewConnection {
        workload: context.pod.key.clone(),
        pod_id: context.pod.id,
        direction: Direction::Outbound,
        source_identity: Some(context.pod.identity.clone()),
        destination_identity: peer,
        peer: chain,
        source: client,
        original_destination: destination,
        upstream: to,
        service: plan.service,
        data_path,
        fallback,
        cipher,
        resumed,
    };
    context.hand_over(app, upstream, new, early, Some(trace), place);
}
