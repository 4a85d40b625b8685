//! Connections to somebody who is not known yet wait for the snapshot that knows.

use std::{net::SocketAddr, time::Duration};

use tokio::time::timeout;

use super::route::{Plan, plan as plan_now};
use crate::{
    mesh::{MeshStore, Resolution, Snapshot},
    telemetry::RefusalReason,
};

/// Decides where `destination` goes, at the latest after `limit`.
pub(super) async fn plan(
    mesh: &MeshStore,
    destination: SocketAddr,
    limit: Duration,
) -> Result<Plan, (RefusalReason, String)> {
    if let Some(decided) = decide(&mesh.load(), destination) {
        return decided;
    }
    let mut generations = mesh.subscribe();
    let decided = async {
        loop {
            // Before the look at the snapshot, so that none is missed.
            generations.borrow_and_update();
            if let Some(decided) = decide(&mesh.load(), destination) {
                return decided;
            }
            // The store, which sends, outlives this.
            let _ = generations.changed().await;
        }
    };
    timeout(limit, decided).await.unwrap_or_else(|_| {
        let who = describe(&mesh.load(), destination);
        Err((RefusalReason::EndpointUnknown, format!("{who}; nothing became known within {limit:?}")))
    })
}

/// What this snapshot says; `None` when another one may know.
fn decide(mesh: &Snapshot, destination: SocketAddr) -> Option<Result<Plan, (RefusalReason, String)>> {
    match plan_now(mesh, destination) {
        Err(RefusalReason::EndpointUnknown) => None,
        decided => Some(decided.map_err(|reason| (reason, describe(mesh, destination)))),
    }
}

/// Why there is no way to a destination, for people.
fn describe(mesh: &Snapshot, destination: SocketAddr) -> String {
    match mesh.resolve(destination.ip()) {
        Resolution::Service(service) => match &service.awaited {
            Some(endpoint) => format!("{endpoint} is an endpoint of {} and not known", service.hostname),
            None => format!("{} has no endpoint for port {}", service.hostname, destination.port()),
        },
        Resolution::Held(held) if held.awaited => format!("nothing is known of the namespace of Pod {}", held.pod),
        Resolution::Held(held) => {
            format!("Pod {} is in the mesh and cannot be reached; see `underpass status`", held.pod)
        }
        Resolution::Workload(_) | Resolution::Unknown => "no route".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::Arc,
        time::{Duration, Instant},
    };

    use super::plan;
    use crate::{
        mesh::{Held, MeshSettings, MeshStore, Service, ServicePort, Snapshot, SnapshotBuilder, WorkloadKey},
        proxy::route::Target,
        telemetry::RefusalReason,
    };

    const SHORT: Duration = Duration::from_millis(200);
    const LONG: Duration = Duration::from_mins(1);

    /// A mesh with a service whose endpoint is awaited, and an address that may be in the mesh; or
    /// one without both.
    fn mesh(unknown: bool) -> Snapshot {
        let mut builder = SnapshotBuilder::new("n", "td.test".parse().unwrap(), MeshSettings::default());
        if unknown {
            let service = Service {
                namespace: "shop".into(),
                name: "web".into(),
                hostname: "web.shop.svc.cluster.local".into(),
                vips: vec!["10.96.0.1".parse().unwrap()],
                ports: vec![ServicePort { port: 80, target_port: 8080 }],
                endpoints: Vec::new(),
                awaited: Some("Pod shop/web-1 at 10.0.0.1".into()),
            };
            builder.service(service).unwrap();
            let pod = WorkloadKey { namespace: "shop".into(), name: "web-2".into() };
            assert!(builder.hold("10.0.0.2".parse().unwrap(), Held { pod, awaited: true }));
        }
        builder.build()
    }

    #[tokio::test]
    async fn a_connection_waits_until_it_is_known_who_answers_and_no_longer() {
        for to in ["10.96.0.1:80", "10.0.0.2:8080"] {
            let to = to.parse().unwrap();
            let store = Arc::new(MeshStore::new(mesh(true)));
            let began = Instant::now();
            let (reason, detail) = plan(&store, to, SHORT).await.unwrap_err();
            assert_eq!(reason, RefusalReason::EndpointUnknown);
            assert!(began.elapsed() >= SHORT && detail.contains("shop/web-"), "{detail}");

            let waiting = Arc::clone(&store);
            let decided = tokio::spawn(async move { plan(&waiting, to, LONG).await });
            tokio::task::yield_now().await;
            store.replace(mesh(true));
            tokio::time::sleep(SHORT).await;
            assert!(!decided.is_finished(), "a snapshot that knows no more decides nothing");
            store.replace(mesh(false));
            assert_eq!(decided.await.unwrap().unwrap().targets, [Target::Plain(to)]);
            assert!(began.elapsed() < LONG);
        }
    }
}
