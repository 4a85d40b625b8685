//! A tunnel from a peer: handshake, PROXY header, checks, then the application.

use std::{
    fmt::Display,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use rustls::AlertDescription;
use tokio::{net::TcpStream, time::timeout};

use super::{Holder, PodContext, accept::reset, dial, observe::Refused};
use crate::{
    bounds::{Entry, Evicted, Place},
    mesh::SpiffeId,
    relay::{DataPath, Direction, NewConnection, Upstream},
    telemetry::{RefusalReason, Reporter, TraceId},
    tunnel::{
        Session, Tunnel, handshake,
        native::{self, MAX_HEADER, Preamble},
    },
};

/// What is known of who dialled.
#[derive(Default)]
struct Peer<'a> {
    identity: Option<&'a SpiffeId>,
    preamble: Option<&'a Preamble>,
}

/// Carries one tunnel connection from accept to the relay. The peer has the place of `entry` until
/// it has proved who it is.
pub(super) async fn serve(context: &PodContext, stream: TcpStream, peer: SocketAddr, mut entry: Entry<IpAddr>) {
    let proxy = &context.proxy;
    let pod = &context.pod;
    let refused = |reason: RefusalReason, detail: &dyn Display, by: &Peer<'_>| {
        context.refused(&Refused {
            direction: Direction::Inbound,
            reason,
            detail,
            source: peer,
            destination: by.preamble.map(|p| p.destination),
            identity: by.identity,
            service: by.preamble.and_then(|p| p.authority.as_deref()),
            trace: by.preamble.and_then(trace),
        });
    };
    if let Some(why) = pod.kept() {
        refused(RefusalReason::KeptPod, &why, &Peer::default());
        return reset(stream);
    }
    let voucher = entry.voucher();
    let handshake = {
        // Boxed, so that what is needed for the handshake goes with the handshake.
        let mut work = Box::pin(async {
            let _ = proxy.certificates.wait_for(&pod.identity, proxy.limits.handshake).await;
            let began = Instant::now();
            let accepted = handshake::accept_telling(stream, &proxy.tls, &pod.identity, || voucher.progress());
            (began, timeout(proxy.limits.handshake, accepted).await)
        });
        entry.guard(work.as_mut()).await
    };
    let (began, mut session) = match handshake {
        Ok((began, Ok(Ok(session)))) => (began, session),
        Ok((_, Ok(Err(e)))) => return refused(e.reason(), &e, &Peer::default()),
        Ok((_, Err(_))) => return refused(RefusalReason::Deadline, &"TLS handshake", &Peer::default()),
        Err(Evicted) => return refused(RefusalReason::PodLimit, &Evicted, &Peer::default()),
    };
    drop(entry);
    proxy.telemetry.handshakes.of(Reporter::Destination).observe(began.elapsed().as_secs_f64());
    let identity = session.info.peer.clone();
    let by = Peer { identity: Some(&identity), preamble: None };
    let Some(place) = context.tunnels.try_enter(Holder::Identity(identity.clone())) else {
        refused(
            RefusalReason::PodLimit,
            &"the pod has its maximum of tunnels, or this peer has nearly all of them",
            &by,
        );
        return session.refuse(AlertDescription::InternalError).await;
    };
    let preamble = match timeout(proxy.limits.handshake, read_preamble(&mut session)).await {
        Ok(Ok(preamble)) => preamble,
        Ok(Err((reason, detail))) => {
            refused(reason, &detail, &by);
            return session.refuse(AlertDescription::AccessDenied).await;
        }
        Err(_) => {
            refused(RefusalReason::Deadline, &"PROXY header", &by);
            return session.refuse(AlertDescription::AccessDenied).await;
        }
    };
    let by = Peer { preamble: Some(&preamble), ..by };
    let mesh = proxy.mesh.load();
    let checked = match mesh.workload(&pod.key) {
        Some(me) => {
            native::check(&preamble, peer.ip(), me, &mesh).map(|port| (own_address(&preamble, &me.addresses), port))
        }
        None => Err(RefusalReason::ProxyDestination),
    };
    let to = match checked {
        Ok((Some(ip), port)) => SocketAddr::new(ip, port),
        Ok((None, _)) => {
            refused(RefusalReason::ProxyDestination, &"no address of that family", &by);
            return session.refuse(AlertDescription::AccessDenied).await;
        }
        Err(reason) => {
            let detail = format!("header says {} to {}", preamble.source, preamble.destination);
            refused(reason, &detail, &by);
            return session.refuse(AlertDescription::AccessDenied).await;
        }
    };
    if let Err(why) = proxy.policies.tunnel(&pod.key, &identity, preamble.source.ip(), to).await {
        refused(RefusalReason::Policy, &why, &by);
        return session.refuse(AlertDescription::AccessDenied).await;
    }
    let application = match dial::application(pod, preamble.source.ip().to_canonical(), to, proxy.limits.connect).await
    {
        Ok(stream) => stream,
        Err(e) => {
            refused(RefusalReason::UpstreamUnreachable, &format!("application at {to}: {e}"), &by);
            return session.refuse(AlertDescription::InternalError).await;
        }
    };
    let tunnel = match timeout(proxy.limits.handshake, session.offload(proxy.tls.ktls())).await {
        Ok(Ok(tunnel)) => tunnel,
        Ok(Err(e)) => return refused(e.reason(), &e, &by),
        Err(_) => return refused(RefusalReason::Deadline, &"the rest of a record", &by),
    };
    hand_over(context, tunnel, application, &preamble, to, place);
}

/// Reads the header and leaves what follows it in `session.plaintext`.
async fn read_preamble(session: &mut Session) -> Result<Preamble, (RefusalReason, String)> {
    loop {
        match native::decode(&session.plaintext) {
            Ok(Some((preamble, length))) => {
                session.plaintext.drain(..length);
                return Ok(preamble);
            }
            Ok(None) => {}
            Err(detail) => return Err((RefusalReason::ProxyHeader, detail)),
        }
        // A record may bring application bytes behind the header, so the limit is one record beyond the longest header.
        match session.receive(MAX_HEADER + crate::tunnel::records::MAX_PLAINTEXT).await {
            Ok(0) => {
                return Err((RefusalReason::ProxyHeader, "the peer ended before its PROXY header was complete".into()));
            }
            Ok(_) => {}
            Err(e) => return Err((e.reason(), e.to_string())),
        }
    }
}

/// Where the application is reached: the address dialled, or, behind a VIP, the pod's own one of the source's family (so that
/// the transparent source fits).
fn own_address(preamble: &Preamble, addresses: &[IpAddr]) -> Option<IpAddr> {
    let dialled = preamble.destination.ip().to_canonical();
    let v4 = preamble.source.ip().to_canonical().is_ipv4();
    if addresses.contains(&dialled) && dialled.is_ipv4() == v4 {
        return Some(dialled);
    }
    addresses.iter().find(|a| a.is_ipv4() == v4).copied()
}

/// What the client's agent calls this connection.
fn trace(preamble: &Preamble) -> Option<TraceId> {
    preamble.unique_id.as_deref()?.try_into().ok().map(TraceId)
}

fn hand_over(
    context: &PodContext,
    tunnel: Tunnel,
    application: TcpStream,
    preamble: &Preamble,
    to: SocketAddr,
    place: Place<Holder>,
) {
    let new = NewConnection {
        workload: context.pod.key.clone(),
        pod_id: context.pod.id,
        direction: Direction::Inbound,
        source_identity: Some(tunnel.info.peer.clone()),
        destination_identity: Some(context.pod.identity.clone()),
        peer: Some(Arc::clone(&tunnel.info.chain)),
        source: preamble.source,
        original_destination: preamble.destination,
        upstream: to,
        service: preamble.authority.as_deref().map(Into::into),
        data_path: DataPath::of(tunnel.fallback()),
        fallback: tunnel.fallback(),
        cipher: Some(tunnel.info.cipher),
        resumed: tunnel.info.resumed,
    };
    context.hand_over(application, Upstream::Tunnel(Box::new(tunnel)), new, 0, trace(preamble), place);
}
