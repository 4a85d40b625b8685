//! Keys in the kernel's form.

use std::io;

use ktls::CryptoInfo;
use rustls::SupportedCipherSuite;
use zeroize::Zeroize as _;

use crate::tunnel::post_handshake::NextKeys;

/// Parameters for the kernel; wiped when dropped.
pub(super) struct KernelKeys(CryptoInfo);

impl KernelKeys {
    pub(super) fn new(suite: SupportedCipherSuite, keys: NextKeys) -> io::Result<Self> {
        CryptoInfo::from_rustls(suite, keys).map(Self).map_err(io::Error::other)
    }

    pub(super) fn parameters(&self) -> &CryptoInfo {
        &self.0
    }
}

impl Drop for KernelKeys {
    fn drop(&mut self) {
        match &mut self.0 {
            CryptoInfo::AesGcm128(info) => info.key.zeroize(),
            CryptoInfo::AesGcm256(info) => info.key.zeroize(),
            CryptoInfo::AesCcm128(info) => info.key.zeroize(),
            CryptoInfo::Chacha20Poly1305(info) => info.key.zeroize(),
            CryptoInfo::Sm4Gcm(info) => info.key.zeroize(),
            CryptoInfo::Sm4Ccm(info) => info.key.zeroize(),
        }
    }
}
