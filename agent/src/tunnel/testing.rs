//! Certificates and established record protection for tests, without sockets or files.

use std::{os::fd::BorrowedFd, sync::Arc, time::Duration};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
};
use rustls::{
    ExtractedSecrets, client::UnbufferedClientConnection, crypto::aws_lc_rs::Ticketer, pki_types::PrivateKeyDer,
    server::UnbufferedServerConnection,
};
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use super::{
    config::{Suite, client_config, peer_name, provider, server_config},
    driver::{Driver, Step, Unbuffered},
    ktls::{KernelTls, Support},
    post_handshake::{PostHandshake, Schedule},
    records::Records,
};
use crate::{identity::Svid, mesh::SpiffeId, sys::tls};

/// A certificate authority that signs whatever a test asks for.
pub(crate) struct TestCa(pub(crate) CertifiedIssuer<'static, KeyPair>);

impl TestCa {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("a self-signed root"))
    }

    /// Parameters of a good leaf for `identity`.
    pub(crate) fn leaf(identity: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.try_into().expect("ASCII"))];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let now = OffsetDateTime::now_utc();
        params.not_before = now - Duration::from_mins(1);
        params.not_after = now + Duration::from_hours(1);
        params
    }

    /// Signs `params` with a new key.
    pub(crate) fn sign(&self, params: &CertificateParams) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a signed certificate");
        (certificate, key)
    }

    /// A revocation list in PEM with this number.
    pub(crate) fn revoke(&self, number: u64, revoked: &[&Svid]) -> String {
        self.crl(number, revoked, |_| {})
    }

    /// [`Self::revoke`], changed before it is signed.
    pub(crate) fn crl(
        &self,
        number: u64,
        revoked: &[&Svid],
        change: impl FnOnce(&mut CertificateRevocationListParams),
    ) -> String {
        let now = OffsetDateTime::now_utc();
        let revoked = revoked.iter().map(|svid| {
            let (_, leaf) = X509Certificate::from_der(&svid.certified.cert[0]).expect("a certificate");
            RevokedCertParams {
                serial_number: leaf.raw_serial().to_vec().into(),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            }
        });
        let mut params = CertificateRevocationListParams {
            this_update: now - Duration::from_mins(1),
            next_update: now + Duration::from_hours(1),
            crl_number: number.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        change(&mut params);
        params.signed_by(&self.0).and_then(|list| list.pem()).expect("a signed list")
    }

    /// A good SVID.
    pub(crate) fn svid(&self, identity: &SpiffeId) -> Arc<Svid> {
        let (certificate, key) = self.sign(&Self::leaf(&identity.to_string()));
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("PKCS#8");
        let svid = Svid::assemble(identity, vec![certificate.der().clone()], key, &[self.0.der().clone()]);
        Arc::new(svid.expect("parts that fit"))
    }
}

/// `spiffe://td.test/ns/default/sa/NAME`
pub(crate) fn identity(name: &str) -> SpiffeId {
    format!("spiffe://td.test/ns/default/sa/{name}").parse().expect("an identity")
}

/// Both ends of an established tunnel, client first, after a real handshake in memory. The tickets that a server sends
/// have been received.
pub(crate) fn pair() -> (Records, Records) {
    pair_with(Suite::Aes128Gcm)
}

/// [`pair`] with a certain cipher.
pub(crate) fn pair_with(suite: Suite) -> (Records, Records) {
    let (client, server) = shake_hands(suite, true);
    let mut tickets = client.unread.clone();
    let mut client = client.records();
    while let Some((_, wire)) = client.open(&mut tickets).expect("tickets") {
        tickets.drain(..wire);
    }
    assert!(tickets.is_empty(), "tickets are whole records");
    (client, server.records())
}

/// What a handshake leaves at one end.
pub(crate) struct Keys {
    pub(crate) secrets: ExtractedSecrets,
    pub(super) schedule: Schedule,
    unread: Vec<u8>,
    /// Our key is to be replaced at this record.
    pub(crate) per_key: Option<u64>,
}

impl Keys {
    /// Protects records here.
    pub(crate) fn records(self) -> Records {
        Records::new(&self.secrets, self.schedule, self.per_key).expect("records")
    }

    /// Has the kernel protect the records of `socket`.
    pub(crate) fn kernel(self, socket: BorrowedFd<'_>, support: &Support) -> KernelTls {
        tls::install(socket).expect("TCP_ULP");
        KernelTls::start(socket, self.secrets, PostHandshake::new(self.schedule), support, self.per_key)
            .expect("keys for the kernel")
    }
}

/// Both ends' keys, client first, of a server that sends no tickets.
pub(crate) fn keys(suite: Suite) -> (Keys, Keys) {
    shake_hands(suite, false)
}

fn shake_hands(suite: Suite, tickets: bool) -> (Keys, Keys) {
    let ca = TestCa::new("pair");
    let (client, server) = (identity("client"), identity("server"));
    let provider = provider(&[suite]);
    let client = client_config(&ca.svid(&client), &server, &provider).expect("a client configuration");
    let ticketer = Ticketer::new().expect("a ticket key");
    let mut server =
        server_config(&ca.svid(&server), server.trust_domain(), ticketer, &provider).expect("a configuration");
    if !tickets {
        server.send_tls13_tickets = 0;
    }

    let mut client = Driver::new(UnbufferedClientConnection::new(Arc::new(client), peer_name()).expect("a client"));
    let mut server = Driver::new(UnbufferedServerConnection::new(Arc::new(server)).expect("a server"));
    loop {
        let a = exchange(&mut client, &mut server);
        let b = exchange(&mut server, &mut client);
        if a == Step::Done && b == Step::Done {
            break;
        }
    }
    let (client, server) = (keys_of(client), keys_of(server));
    assert!(server.unread.is_empty(), "the client sends nothing behind its handshake");
    (client, server)
}

fn keys_of<C: Unbuffered>(driver: Driver<C>) -> Keys {
    let (secrets, schedule, unread) = driver.into_keys().expect("keys");
    Keys { secrets, schedule, unread, per_key: None }
}

fn exchange<A: Unbuffered, B>(from: &mut Driver<A>, to: &mut Driver<B>) -> Step {
    let step = from.advance().expect("a handshake between good certificates");
    to.incoming.append(&mut from.outgoing);
    step
}
