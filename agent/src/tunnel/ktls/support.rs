//! What the kernel can do, found by trying it on connected loopback sockets.

use std::{
    io,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    time::Duration,
};

use nix::{
    Error as Errno, libc,
    sys::socket::{
        setsockopt,
        sockopt::{TcpTlsRx, TcpTlsTx, TlsCryptoInfo},
    },
};
use tokio::{process::Command, time::timeout};
use tracing::debug;

use crate::{sys::tls, tunnel::Suite};

/// What kernel TLS needs when the kernel does not load it by itself: the protocol, then the ciphers and what makes them fast.
const MODULES: [&str; 6] = ["tls", "gcm", "aesni_intel", "ghash_clmulni_intel", "chacha20poly1305", "chacha_x86_64"];
/// How long loading them may take.
const LOADING: Duration = Duration::from_secs(20);

/// Whether there is kernel TLS at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Yes.
    Ready,
    /// No, and why.
    Missing(String),
    /// Nobody wants it.
    Disabled,
}

/// What the kernel can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Support {
    /// Whether there is kernel TLS at all.
    pub availability: Availability,
    /// Suites that it protects records with.
    pub suites: Vec<Suite>,
    /// Suites that it does not, and why.
    pub refused: Vec<(Suite, String)>,
    /// Whether keys can be replaced (Linux 6.14).
    pub rekey: bool,
    /// Whether it can be told that records have no padding (Linux 6.0).
    pub no_padding: bool,
}

impl Support {
    /// Uses none of it.
    pub fn disabled() -> Self {
        Self::without(Availability::Disabled)
    }

    /// Finds out.
    pub fn probe() -> Self {
        if let Err(error) = tls_socket() {
            let why = match error.raw_os_error() {
                Some(libc::ENOENT) => {
                    "the kernel has no CONFIG_TLS, or its module cannot be loaded (modprobe tls)".to_owned()
                }
                _ => format!("TCP_ULP tls: {error}"),
            };
            return Self::without(Availability::Missing(why));
        }
        let mut support = Self::without(Availability::Ready);
        for suite in Suite::ALL {
            match try_cipher(suite) {
                Ok(()) => support.suites.push(suite),
                Err(why) => support.refused.push((suite, why)),
            }
        }
        if let Some(&suite) = support.suites.first() {
            support.rekey = try_rekey(suite).is_ok();
            support.no_padding = try_no_padding(suite).is_ok();
        }
        support
    }

    /// Finds out, and loads modules when something is missing. A kernel whose `kernel.modprobe` works has loaded them by then.
    pub async fn prepare() -> Self {
        let support = Self::probe();
        if support.availability == Availability::Ready && support.refused.is_empty() {
            return support;
        }
        let modprobe = Command::new("modprobe").args(["--quiet", "--all"]).args(MODULES).kill_on_drop(true).output();
        match timeout(LOADING, modprobe).await {
            Ok(Ok(output)) => debug!(status = %output.status, "modprobe"),
            Ok(Err(error)) => debug!(%error, "modprobe"),
            Err(_) => debug!("modprobe takes too long"),
        }
        Self::probe()
    }

    /// Whether records of this suite can go to the kernel.
    pub fn covers(&self, suite: Suite) -> bool {
        self.suites.contains(&suite)
    }

    fn without(availability: Availability) -> Self {
        Self { availability, suites: Vec::new(), refused: Vec::new(), rekey: false, no_padding: false }
    }
}

fn try_cipher(suite: Suite) -> Result<(), String> {
    let set = |suite| -> io::Result<()> {
        let (socket, _peer) = tls_socket()?;
        setsockopt(&socket, TcpTlsRx, &parameters(suite))?;
        Ok(setsockopt(&socket, TcpTlsTx, &parameters(suite))?)
    };
    set(suite).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT) => "crypto module not loaded".to_owned(),
        _ => e.to_string(),
    })
}

/// By behaviour: a second set of keys on one socket is accepted, or `EBUSY`.
fn try_rekey(suite: Suite) -> io::Result<()> {
    let (socket, _peer) = tls_socket()?;
    setsockopt(&socket, TcpTlsTx, &parameters(suite))?;
    match setsockopt(&socket, TcpTlsTx, &parameters(suite)) {
        Err(e @ Errno::EBUSY) => Err(e.into()),
        other => Ok(other?),
    }
}

fn try_no_padding(suite: Suite) -> io::Result<()> {
    let (socket, _peer) = tls_socket()?;
    setsockopt(&socket, TcpTlsRx, &parameters(suite))?;
    tls::expect_no_padding(socket.as_fd())
}

/// A connected socket with the tls protocol on it, and its peer (which must stay open).
fn tls_socket() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    let (peer, _) = listener.accept()?;
    tls::install(stream.as_fd())?;
    Ok((stream, peer))
}

/// Keys of zeros: nothing is ever sent with them.
fn parameters(suite: Suite) -> TlsCryptoInfo {
    let info = |cipher_type| libc::tls_crypto_info { version: libc::TLS_1_3_VERSION, cipher_type };
    match suite {
        Suite::Aes128Gcm => TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
            info: info(libc::TLS_CIPHER_AES_GCM_128),
            iv: [0; 8],
            key: [0; 16],
            salt: [0; 4],
            rec_seq: [0; 8],
        }),
        Suite::Aes256Gcm => TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
            info: info(libc::TLS_CIPHER_AES_GCM_256),
            iv: [0; 8],
            key: [0; 32],
            salt: [0; 4],
            rec_seq: [0; 8],
        }),
        Suite::Chacha20Poly1305 => TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
            info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
            iv: [0; 12],
            key: [0; 32],
            salt: [],
            rec_seq: [0; 8],
        }),
    }
}
