//! Drives rustls' unbuffered API over a non-blocking socket until traffic keys can be taken out.

use std::{sync::Arc, time::SystemTime};

use bytes::BufMut as _;
use rustls::{
    AlertDescription, CommonState, HandshakeKind, client::UnbufferedClientConnection,
    server::UnbufferedServerConnection,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{
    ALPN_NATIVE, Session, SessionInfo, TlsConfigs, TunnelError, UserRecords,
    config::peer_name,
    driver::{Driver, DriverError, Step, Unbuffered},
    session::drain,
    verify::{Accepted, IdentityRefusal, Leaves, Shown, refusal},
};
use crate::{identity::Revocations, mesh::SpiffeId, telemetry::RefusalReason};

/// How much is asked of the socket at once.
pub(super) const READ_CHUNK: usize = 16 * 1024;

/// Handshakes as a client. The peer must prove `peer` and choose [`super::ALPN_NATIVE`]. What `first` gives is sent as application data
/// together with the end of the handshake; it is asked when the peer has proved itself. The caller bounds the time.
pub async fn connect(
    stream: TcpStream,
    configs: &TlsConfigs,
    local: &SpiffeId,
    peer: &SpiffeId,
    first: impl FnOnce() -> Vec<u8>,
) -> Result<Session, TunnelError> {
    let (config, _) = configs.client(local, peer).ok_or_else(|| no_certificate(local))?;
    let connection = UnbufferedClientConnection::new(config, peer_name()).map_err(|e| refusal(&e))?;
    handshake(stream, Driver::new(connection), configs, local, &Accepted::Exactly(peer.clone()), first, || {}).await
}

/// Handshakes as a server. Refusals have been sent to the peer as alerts (drained as [`Session::refuse`] does) when this returns
/// an error. The caller bounds the time.
pub async fn accept(stream: TcpStream, configs: &TlsConfigs, local: &SpiffeId) -> Result<Session, TunnelError> {
    accept_telling(stream, configs, local, || {}).await
}

/// [`accept`] that says when the peer's part is all that is missing: its hello is answered.
pub(crate) async fn accept_telling(
    stream: TcpStream,
    configs: &TlsConfigs,
    local: &SpiffeId,
    answered: impl Fn(),
) -> Result<Session, TunnelError> {
    let (config, _) = configs.server(local).ok_or_else(|| no_certificate(local))?;
    let connection = UnbufferedServerConnection::new(config).map_err(|e| refusal(&e))?;
    let accepted = Accepted::Domain(configs.trust_domain().clone());
    handshake(stream, Driver::new(connection), configs, local, &accepted, Vec::new, answered).await
}

fn no_certificate(local: &SpiffeId) -> TunnelError {
    TunnelError::Refused {
        reason: RefusalReason::NoCertificate,
        detail: format!("{local} has no valid certificate; `underpass certificates` says why"),
    }
}

async fn handshake<C: Unbuffered>(
    mut stream: TcpStream,
    mut driver: Driver<C>,
    configs: &TlsConfigs,
    local: &SpiffeId,
    accepted: &Accepted,
    first: impl FnOnce() -> Vec<u8>,
    answered: impl Fn(),
) -> Result<Session, TunnelError> {
    loop {
        let step = driver.advance();
        if matches!(step, Ok(Step::Done)) {
            break;
        }
        let sending = !driver.outgoing.is_empty();
        if sending {
            let sent = stream.write_all(&driver.outgoing).await;
            driver.outgoing.clear();
            match (&step, sent) {
                // What rustls found wrong says more than that the peer did not wait for the alert.
                (Err(_), _) | (_, Ok(())) => {}
                (_, Err(source)) => return Err(TunnelError::Io { action: "sending the TLS handshake", source }),
            }
            answered();
        }
        match step {
            Ok(Step::Done) => unreachable!("the loop has ended"),
            Ok(Step::Receive { missing }) => {
                match read_more(&mut stream, &mut driver.incoming, missing.max(READ_CHUNK)).await {
                    Ok(0) => {
                        return Err(TunnelError::Refused {
                            reason: RefusalReason::TlsHandshake,
                            detail: "peer closed the connection during the TLS handshake".into(),
                        });
                    }
                    Ok(_) => {}
                    Err(source) => return Err(TunnelError::Io { action: "receiving the TLS handshake", source }),
                }
            }
            // A reset is the only answer that every protocol understands.
            Err(DriverError::NotTls(detail)) => {
                let _ = stream.set_zero_linger();
                return Err(TunnelError::Refused { reason: RefusalReason::NotTls, detail });
            }
            Err(DriverError::Tls(error)) => {
                if sending {
                    drain(stream).await;
                }
                return Err(refusal(&error));
            }
        }
    }
    finish(stream, driver, configs, local, accepted, first).await
}

/// Takes the keys out and checks what rustls does not: the ALPN, and the peer's certificate once more, because a resumed
/// session brings an old one.
async fn finish<C: Unbuffered>(
    stream: TcpStream,
    mut driver: Driver<C>,
    configs: &TlsConfigs,
    local: &SpiffeId,
    accepted: &Accepted,
    first: impl FnOnce() -> Vec<u8>,
) -> Result<Session, TunnelError> {
    let unsent = std::mem::take(&mut driver.outgoing);
    let facts = Facts::of(driver.connection.common());
    let judged = judge(driver.connection.common(), accepted, configs.leaves(), configs.revocations());
    let (secrets, schedule, unread) = driver.into_keys().map_err(|e| refusal(&e))?;
    let Facts { cipher, key_exchange, resumed } = facts;
    let info = |peer, chain| SessionInfo { local: local.clone(), peer, chain, cipher, key_exchange, resumed };
    let records = UserRecords::new(secrets, schedule, unread, unsent, configs.records_per_key())?;
    match judged {
        Ok(Shown { leaf, chain }) => {
            let mut session = Session::new(stream, records, info(leaf.identity, chain));
            session.send(&first()).await?;
            Ok(session)
        }
        Err((alert, error)) => {
            Session::new(stream, records, info(local.clone(), Arc::default())).refuse(alert).await;
            Err(error)
        }
    }
}

/// Appends at most `most` bytes to `buffer`; 0 is the end.
pub(super) async fn read_more(stream: &mut TcpStream, buffer: &mut Vec<u8>, most: usize) -> std::io::Result<usize> {
    buffer.reserve(most);
    stream.read_buf(&mut buffer.limit(most)).await
}

/// What the peer has shown, or the alert that it gets.
pub(super) fn judge(
    common: &CommonState,
    accepted: &Accepted,
    leaves: &Leaves,
    revocations: &Revocations,
) -> Result<Shown, (AlertDescription, TunnelError)> {
    if common.alpn_protocol() != Some(ALPN_NATIVE) {
        let offered = common.alpn_protocol().map_or("none".into(), |p| String::from_utf8_lossy(p).into_owned());
        let detail = format!("peer's application protocol is {offered}, not underpass/1; is it an Underpass agent?");
        return Err((
            AlertDescription::NoApplicationProtocol,
            TunnelError::Refused { reason: RefusalReason::NoAlpn, detail },
        ));
    }
    let shown = leaves.parse(common.peer_certificates().unwrap_or_default()).and_then(|shown| {
        let Shown { leaf, chain } = shown;
        let leaf = accepted.check_parsed(leaf)?;
        if !leaf.valid_at(SystemTime::now()) {
            return Err(IdentityRefusal::NotValidNow { peer: leaf.identity });
        }
        if revocations.revoke(&chain) {
            return Err(IdentityRefusal::Revoked { peer: leaf.identity });
        }
        Ok(Shown { leaf, chain })
    });
    shown.map_err(|r| {
        let alert = match r {
            IdentityRefusal::NotValidNow { .. } => AlertDescription::CertificateExpired,
            IdentityRefusal::Revoked { .. } => AlertDescription::CertificateRevoked,
            _ => super::alert::DENIED,
        };
        (alert, TunnelError::Refused { reason: r.reason(), detail: r.to_string() })
    })
}

struct Facts {
    cipher: &'static str,
    key_exchange: &'static str,
    resumed: bool,
}

impl Facts {
    fn of(common: &CommonState) -> Self {
        Self {
            cipher: common.negotiated_cipher_suite().and_then(|s| s.suite().as_str()).unwrap_or("unknown"),
            key_exchange: common.negotiated_key_exchange_group().and_then(|g| g.name().as_str()).unwrap_or("unknown"),
            resumed: common.handshake_kind() == Some(HandshakeKind::Resumed),
        }
    }
}
