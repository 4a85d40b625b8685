use std::{fs, sync::Arc};

use super::support::{Party, error, established, meet};
use crate::{
    identity::{Revocations, Svid},
    telemetry::RefusalReason,
    tunnel::{
        TlsOptions,
        handshake::connect,
        testing::{TestCa, identity},
    },
};

struct Scene {
    directory: tempfile::TempDir,
    ca: TestCa,
    client: Arc<Svid>,
    server: Arc<Svid>,
}

impl Scene {
    fn new() -> Self {
        let ca = TestCa::new("root");
        let [client, server] = ["client", "server"].map(|name| ca.svid(&identity(name)));
        Self { directory: tempfile::tempdir().unwrap(), ca, client, server }
    }

    /// An agent that knows of these revocations.
    async fn party(&self, svid: &Svid, revoked: &[&Svid]) -> Party {
        let file = self.directory.path().join("crl.pem");
        fs::write(&file, self.ca.revoke(1, revoked)).unwrap();
        let revocations = Arc::new(Revocations::open(&file).unwrap());
        Party::with_options(svid, &TlsOptions { revocations, ..TlsOptions::default() }).await
    }
}

#[tokio::test]
async fn a_revoked_client_is_refused() {
    let scene = Scene::new();
    let client = scene.party(&scene.client, &[]).await;
    let other = scene.party(&scene.ca.svid(&identity("other")), &[]).await;
    let server = scene.party(&scene.server, &[&scene.client]).await;
    let (told, refused) = meet(
        async |stream| match connect(stream, &client.configs, &client.id, &server.id, Vec::new).await {
            Ok(mut session) => session.receive(1024).await.map(drop),
            Err(error) => Err(error),
        },
        &server,
    )
    .await;
    let refused = error(refused);
    assert_eq!(refused.reason(), RefusalReason::CertificateRevoked, "{refused}");
    assert!(refused.to_string().contains("sa/client"), "{refused}");
    assert_eq!(error(told).reason(), RefusalReason::DeniedByPeer);
    established(&other, &server).await;
}

#[tokio::test]
async fn a_revoked_server_gets_no_byte_of_the_application() {
    let scene = Scene::new();
    let client = scene.party(&scene.client, &[&scene.server]).await;
    let server = scene.party(&scene.server, &[]).await;
    let mut asked = false;
    let (refused, session) = meet(
        async |stream| {
            let first = || {
                asked = true;
                b"secret".to_vec()
            };
            connect(stream, &client.configs, &client.id, &server.id, first).await
        },
        &server,
    )
    .await;
    let refused = error(refused);
    assert_eq!(refused.reason(), RefusalReason::CertificateRevoked, "{refused}");
    assert!(!asked, "what is sent first is not even asked for");
    if let Ok(mut session) = session {
        let told = error(session.receive(1024).await);
        assert_eq!(told.reason(), RefusalReason::DeniedByPeer, "{told}");
        assert!(session.plaintext.is_empty());
    }
}

/// Both ends know each other, and one of them is revoked then: sessions that exist are of no use.
#[tokio::test]
async fn a_session_is_not_resumed_past_a_revocation() {
    for of_client in [true, false] {
        let scene = Scene::new();
        let (client, server) = (scene.party(&scene.client, &[]).await, scene.party(&scene.server, &[]).await);
        let (mut a, mut b) = established(&client, &server).await;
        // The ticket comes before the first record.
        b.send(b"x").await.unwrap();
        a.receive(10).await.unwrap();
        let (mut a, mut b) = established(&client, &server).await;
        assert!(a.info.resumed && b.info.resumed, "the control");
        b.send(b"x").await.unwrap();
        a.receive(10).await.unwrap();

        let (judging, revoked) = if of_client { (&server, &scene.client) } else { (&client, &scene.server) };
        let revocations = judging.configs.revocations();
        let mut changes = revocations.subscribe();
        fs::write(scene.directory.path().join("crl.pem"), scene.ca.revoke(2, &[revoked])).unwrap();
        let follow = tokio::spawn(Arc::clone(revocations).follow(Arc::clone(&judging.store)));
        changes.wait_for(|version| *version > 1).await.unwrap();
        follow.abort();
        let chain = if of_client { &b.info.chain } else { &a.info.chain };
        assert!(revocations.revoke(chain), "the live connection's other end is found, too");

        let (dialled, accepted) =
            meet(async |stream| connect(stream, &client.configs, &client.id, &server.id, Vec::new).await, &server)
                .await;
        let refused = if of_client { error(accepted) } else { error(dialled) };
        assert_eq!(refused.reason(), RefusalReason::CertificateRevoked, "{refused}");
    }
}
