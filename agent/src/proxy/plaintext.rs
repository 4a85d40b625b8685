//! A plaintext connection that the tc program handed over because a policy depends on where it comes from.

use std::net::SocketAddr;

use tokio::net::TcpStream;
use tracing::debug;
use underpass_abi::is_agent_port;

use super::{Holder, PodContext, accept::reset, dial, observe::Refused};
use crate::{
    bounds::Place,
    relay::{DataPath, Direction, NewConnection, Upstream},
    telemetry::RefusalReason,
};

/// Carries one connection from accept to the relay; a refusal is a reset.
pub(super) async fn serve(context: &PodContext, stream: TcpStream, peer: SocketAddr, place: Place<Holder>) {
    let (proxy, pod) = (&context.proxy, &context.pod);
    // The socket has the addresses of the packet, whatever its listener's are.
    let destination = match stream.local_addr() {
        Ok(address) if !is_agent_port(address.port()) => SocketAddr::new(address.ip().to_canonical(), address.port()),
        _ => {
            proxy.counters.refuse(RefusalReason::NoOriginalDestination);
            debug!(pod = %pod.key, %peer, "reset: nobody handed this connection over");
            return reset(stream);
        }
    };
    let source = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let refused = |reason: RefusalReason, detail: &dyn std::fmt::Display| {
        context.refused(&Refused {
            direction: Direction::Inbound,
            reason,
            detail,
            source,
            destination: Some(destination),
            identity: None,
            service: None,
            trace: None,
        });
    };
    if let Some(why) = pod.kept() {
        refused(RefusalReason::KeptPod, &why);
        return reset(stream);
    }
    if let Err(why) = proxy.policies.plaintext(&pod.key, source.ip(), destination).await {
        refused(RefusalReason::Policy, &why);
        return reset(stream);
    }
    let application = match dial::application(pod, source.ip(), destination, proxy.limits.connect).await {
        Ok(application) => application,
        Err(e) => {
            refused(RefusalReason::UpstreamUnreachable, &format!("application at {destination}: {e}"));
            return reset(stream);
        }
    };
    let upstream = match stream.into_std() {
        Ok(upstream) => Upstream::Plain(upstream.into()),
        Err(e) => return refused(RefusalReason::Resources, &format!("leaving the reactor: {e}")),
    };
    let new = NewConnection {
        workload: pod.key.clone(),
        pod_id: pod.id,
        direction: Direction::Inbound,
        source_identity: None,
        destination_identity: Some(pod.identity.clone()),
        peer: None,
        source,
        original_destination: destination,
        upstream: destination,
        service: None,
        data_path: DataPath::Plain,
        fallback: None,
        cipher: None,
        resumed: false,
    };
    context.hand_over(application, upstream, new, 0, None, place);
}
