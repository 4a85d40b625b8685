//! The admin socket's server: any bytes are answered or cut, and only a well-formed request closes a connection.
#![no_main]

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use libfuzzer_sys::fuzz_target;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    runtime::{Builder, Runtime},
};
use underpass::{
    admin::{
        api::{AllCounters, Connections, KtlsStatus, Status},
        inventory::{self, Certificates, Services, Workloads},
        query::ConnectionQuery,
        server::{Source, connection, router},
    },
    mesh::Snapshot,
    policy::{self, Explanations, PolicyList, Query, QueryError},
    relay::ConnectionId,
    sources::file::ReloadStatus,
};

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_all().build().expect("a runtime"));

#[derive(Default)]
struct Agent(AtomicBool);

impl Source for Agent {
    fn status(&self) -> Status {
        Status::new(KtlsStatus::default(), Vec::new(), ReloadStatus::default())
    }

    fn connections(&self, query: &ConnectionQuery) -> Connections {
        assert!((1..=100_000).contains(&query.limit()), "limit {}", query.limit());
        Connections { total: 0, connections: Vec::new() }
    }

    fn workloads(&self, limit: usize) -> Workloads {
        assert!((1..=100_000).contains(&limit), "limit {limit}");
        inventory::workloads(&mesh(), &[], limit)
    }

    fn services(&self, limit: usize) -> Services {
        assert!((1..=100_000).contains(&limit), "limit {limit}");
        inventory::services(&mesh(), limit)
    }

    fn certificates(&self) -> Certificates {
        Certificates { trust_domain: "cluster.local".into(), source: "local".into(), certificates: Vec::new() }
    }

    fn close(&self, _: ConnectionId) -> bool {
        self.0.store(true, Relaxed);
        true
    }

    fn counters(&self) -> AllCounters {
        AllCounters::default()
    }

    fn policies(&self) -> PolicyList {
        policy::summaries(&mesh())
    }

    fn explain(&self, query: &Query) -> Result<Explanations, QueryError> {
        policy::explain(&mesh(), query)
    }
}

fn mesh() -> Snapshot {
    Snapshot::empty("node-a", "cluster.local".parse().expect("a trust domain"))
}

fuzz_target!(|bytes: &[u8]| {
    let agent = Arc::new(Agent::default());
    let answer = RUNTIME.block_on(async {
        let (client, server) = duplex(64 * 1024);
        let serve = connection(server, router(Arc::clone(&agent) as _));
        let talk = async {
            let (mut read, mut write) = tokio::io::split(client);
            let mut answer = Vec::new();
            let send = async {
                let _ = write.write_all(bytes).await;
                let _ = write.shutdown().await;
            };
            let ((), _) = tokio::join!(send, read.read_to_end(&mut answer));
            answer
        };
        tokio::join!(serve, talk).1
    });
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."), "{answer:?}");
    if agent.0.load(Relaxed) {
        assert!(bytes.windows(5).any(|w| w == b"POST "), "{bytes:?} closed a connection");
    }
});
