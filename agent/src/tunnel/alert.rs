//! Alerts on the tunnel (RFC 8446, section 6): their encoding, and what a received one means.

use rustls::AlertDescription;

use crate::telemetry::RefusalReason;

/// Level of `close_notify`. TLS 1.3 ignores levels on receipt.
pub(super) const WARNING: u8 = 1;
/// Level of every other alert.
pub(super) const FATAL: u8 = 2;

/// Sent when policy or identity forbids the connection.
pub const DENIED: AlertDescription = AlertDescription::AccessDenied;
/// Sent when the application behind us cannot be reached.
pub const UPSTREAM_UNREACHABLE: AlertDescription = AlertDescription::InternalError;

/// The alert as a message.
pub(super) fn encode(level: u8, description: AlertDescription) -> [u8; 2] {
    [level, description.into()]
}

/// The description in a message, if it is one alert and nothing else.
pub(super) fn decode(message: &[u8]) -> Option<AlertDescription> {
    match message {
        [WARNING | FATAL, description] => Some(AlertDescription::from(*description)),
        _ => None,
    }
}

/// How a fatal alert from the peer is counted.
pub fn reason(alert: AlertDescription) -> RefusalReason {
    use AlertDescription as A;
    match alert {
        UPSTREAM_UNREACHABLE => RefusalReason::PeerUpstreamUnreachable,
        A::NoApplicationProtocol => RefusalReason::NoAlpn,
        DENIED
        | A::BadCertificate
        | A::UnsupportedCertificate
        | A::CertificateRevoked
        | A::CertificateExpired
        | A::CertificateUnknown
        | A::CertificateRequired
        | A::UnknownCA => RefusalReason::DeniedByPeer,
        _ => RefusalReason::TlsHandshake,
    }
}
