//! Kernel TLS, tried on connected loopback sockets.

use std::{
    io,
    net::{Ipv4Addr, TcpListener, TcpStream},
};

use nix::{
    Error as Errno, libc,
    sys::socket::{
        setsockopt,
        sockopt::{TcpTlsTx, TcpUlp, TlsCryptoInfo},
    },
};

use super::row::{Check, Row};

/// What is used where kernel TLS is not, or not in full.
const INSTEAD: &str = "TLS in the agent (rustls): same protection, more copies";

pub(super) fn rows() -> [Row; 3] {
    let (ktls, ciphers, rekey) = (Check("ktls", false), Check("ktls-ciphers", false), Check("ktls-rekey", false));
    if let Err(error) = tls_socket() {
        let why = match error.raw_os_error() {
            Some(libc::ENOENT) => "the kernel has no CONFIG_TLS, or its module is not loaded (modprobe tls)".to_owned(),
            _ => format!("TCP_ULP tls: {error}"),
        };
        let without = |check: Check| check.degraded("no kernel TLS to try it on", INSTEAD);
        return [ktls.degraded(why, INSTEAD), without(ciphers), without(rekey)];
    }
    [ktls.ok("TCP_ULP tls on a connected socket"), cipher_row(ciphers), rekey_row(rekey)]
}

fn cipher_row(check: Check) -> Row {
    let (mut works, mut fails) = (Vec::new(), Vec::new());
    for (name, crypto) in ciphers() {
        match tls_socket().and_then(|(s, _peer)| setsockopt(&s, TcpTlsTx, &crypto).map_err(io::Error::from)) {
            Ok(()) => works.push(name.to_owned()),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                fails.push(format!("{name} (crypto module not loaded)"));
            }
            Err(e) => fails.push(format!("{name} ({e})")),
        }
    }
    if fails.is_empty() {
        return check.ok(works.join(", "));
    }
    let works = if works.is_empty() { "none".to_owned() } else { works.join(", ") };
    let instead = format!("suites that work are preferred; for the others, {INSTEAD}");
    check.degraded(format!("works: {works}; does not: {}", fails.join(", ")), instead)
}

/// By behaviour: the second set of keys on one socket is accepted, or EBUSY.
fn rekey_row(check: Check) -> Row {
    const WITHOUT: &str = "connections end before the AEAD limit (some 390 GB with AES-GCM)";
    let tried = tls_socket().and_then(|(s, _peer)| {
        let (_, crypto) = ciphers()[0];
        setsockopt(&s, TcpTlsTx, &crypto)?;
        Ok(setsockopt(&s, TcpTlsTx, &crypto))
    });
    match tried {
        Ok(Ok(())) => check.ok("tried: keys can be replaced"),
        Ok(Err(Errno::EBUSY)) => check.degraded("tried: keys cannot be replaced (EBUSY)", WITHOUT),
        Ok(Err(e)) => check.degraded(format!("tried: {e}"), WITHOUT),
        Err(e) => check.degraded(format!("could not be tried: {e}"), WITHOUT),
    }
}

/// A connected socket with the tls protocol on it, and its peer (which must stay open).
fn tls_socket() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    let (peer, _) = listener.accept()?;
    setsockopt(&stream, TcpUlp::default(), b"tls")?;
    Ok((stream, peer))
}

/// TLS 1.3 suites with keys of zeros: nothing is ever sent with them.
fn ciphers() -> [(&'static str, TlsCryptoInfo); 3] {
    let info = |cipher_type| libc::tls_crypto_info { version: libc::TLS_1_3_VERSION, cipher_type };
    [
        (
            "AES-128-GCM",
            TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
                info: info(libc::TLS_CIPHER_AES_GCM_128),
                iv: [0; 8],
                key: [0; 16],
                salt: [0; 4],
                rec_seq: [0; 8],
            }),
        ),
        (
            "AES-256-GCM",
            TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
                info: info(libc::TLS_CIPHER_AES_GCM_256),
                iv: [0; 8],
                key: [0; 32],
                salt: [0; 4],
                rec_seq: [0; 8],
            }),
        ),
        (
            "ChaCha20-Poly1305",
            TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
                info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
                iv: [0; 12],
                key: [0; 32],
                salt: [],
                rec_seq: [0; 8],
            }),
        ),
    ]
}
