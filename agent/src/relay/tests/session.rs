//! From handshakes over sockets to relayed connections, the way the proxy does it.

use std::{collections::BTreeSet, io::Write, sync::atomic::Ordering::Relaxed};

use futures_util::future::{self, BoxFuture};
use tokio::{net, runtime};

use super::*;
use crate::{
    identity::{CertificateStore, IssueError, Issuer, Svid},
    mesh::SpiffeId,
    relay::{Job, Upstream},
    tunnel::{Session, TlsConfigs, TlsOptions, Tunnel, handshake, testing::TestCa},
};

/// Issues one certificate.
struct One(Arc<Svid>);

impl Issuer for One {
    fn name(&self) -> &'static str {
        "test"
    }

    fn issue<'a>(&'a self, _: &'a SpiffeId) -> BoxFuture<'a, Result<Svid, IssueError>> {
        Box::pin(async { Ok(Svid::clone(&self.0)) })
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(future::pending())
    }
}

async fn configs(ca: &TestCa, identity: &SpiffeId) -> Arc<TlsConfigs> {
    let store = CertificateStore::new(Arc::new(One(ca.svid(identity))));
    tokio::spawn(Arc::clone(&store).run());
    store.want(BTreeSet::from([identity.clone()]));
    store.wait_for(identity, PATIENCE).await.expect("a certificate");
    let options = ktls().map_or_else(TlsOptions::default, |support| TlsOptions::with_ktls(support.clone()));
    TlsConfigs::with_options(store, identity.trust_domain().clone(), &options)
}

async fn sessions() -> (Session, Session) {
    let ca = TestCa::new("root");
    let (client, server) = (testing::identity("client"), testing::identity("server"));
    let (ours, theirs) = (configs(&ca, &client).await, configs(&ca, &server).await);
    let listener = net::TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address");
    let (a, b) = tokio::join!(
        async {
            let stream = net::TcpStream::connect(address).await.expect("a connection");
            handshake::connect(stream, &ours, &client, &server, || b"HEADER".to_vec()).await
        },
        async {
            let (stream, _) = listener.accept().await.expect("a connection");
            handshake::accept(stream, &theirs, &server).await
        }
    );
    (a.expect("a client"), b.expect("a server"))
}

fn submit(node: &Node, direction: Direction, tunnel: Tunnel) -> (TcpStream, Watched) {
    let (application, inner) = sockets();
    inner.set_nonblocking(true).expect("non-blocking");
    SockRef::from(&inner).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    let connection = node.add(direction, DataPath::User);
    let (guard, end) = mpsc::channel::<()>();
    node.relay.submit(Job {
        application: inner.into(),
        upstream: Upstream::Tunnel(Box::new(tunnel)),
        connection: Arc::clone(&connection),
        guard: Box::new(guard),
    });
    (application, Watched { connection, end })
}

/// The first bytes of the tunnel are read by the proxies; what came with them is the application's.
#[test]
fn sessions_become_relayed_connections() {
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (near, far) = (Node::new(), Node::new());
    let (client_session, server_session) = runtime.block_on(async {
        let (mut client, mut server) = sessions().await;
        let (client, server) = tokio::join!(
            async {
                // In one record with nothing else to wait for: part of it is the application's.
                client.send(b"+early data").await.expect("sending");
                client
            },
            async {
                while server.plaintext.len() < 6 {
                    assert!(server.receive(1 << 16).await.expect("receiving") > 0);
                }
                server.plaintext.drain(..6);
                server
            }
        );
        let support = ktls().cloned().unwrap_or_else(Support::disabled);
        let (client, server) = tokio::join!(client.offload(&support), server.offload(&support));
        (client.expect("a client's tunnel"), server.expect("a server's tunnel"))
    });
    let (client, one) = submit(&near, Direction::Outbound, client_session);
    let (server, two) = submit(&far, Direction::Inbound, server_session);
    let mut early = [0; 11];
    (&server).read_exact(&mut early).expect("what came with the header");
    assert_eq!(&early, b"+early data");
    let ends = Ends { client, server, relayed: vec![one, two] };
    exchange(&ends, seed() >> 1, 3 << 20, 32 << 10);
    assert_eq!(ends.reasons(), [CloseReason::Finished; 2]);
    assert_eq!(ends.relayed[1].connection.received.load(Relaxed), 11 + (3 << 20));

    // And a plain one by the same way.
    let ((mut client, inner), (outer, server)) = (sockets(), sockets());
    inner.set_nonblocking(true).expect("non-blocking");
    outer.set_nonblocking(true).expect("non-blocking");
    let connection = near.add(Direction::Outbound, DataPath::Plain);
    near.relay.submit(Job {
        application: inner.into(),
        upstream: Upstream::Plain(outer.into()),
        connection,
        guard: Box::new(()),
    });
    client.write_all(b"plain").expect("sending");
    drop(client);
    assert_eq!(read_all(&server), (b"plain".to_vec(), Ok(())));
}
