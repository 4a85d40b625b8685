//! The AEAD of TLS 1.3 records (RFC 8446, section 5.2), in place.
//!
//! rustls' own record objects allocate and copy each record that they seal, and aws-lc's AES-GCM knows 512-bit vectors or none: ring's uses
//! 256-bit ones too, which doubles its speed on processors that have only those. So the ciphers are ring's; nonce, associated data and padding are rustls'.

use ring::aead::{self, Aad, LessSafeKey, UnboundKey};
use rustls::{
    ConnectionTrafficSecrets, ContentType, Error, ProtocolVersion,
    crypto::cipher::{AeadKey, InboundOpaqueMessage, Iv, Nonce, make_tls13_aad},
};

use super::{HEADER, TAG};

/// One direction's key.
pub(super) struct Key {
    key: LessSafeKey,
    iv: Iv,
}

impl Key {
    /// Takes the key out of what rustls derived.
    pub(super) fn new(secrets: &ConnectionTrafficSecrets) -> Result<Self, Error> {
        use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
        let (algorithm, key, iv): (_, &AeadKey, &Iv) = match secrets {
            Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            Chacha20Poly1305 { key, iv } => (&aead::CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("unknown cipher".into())),
        };
        let wrong = |what: &str| Error::General(format!("{what} of a wrong length"));
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| wrong("key"))?;
        let iv = <[u8; aead::NONCE_LEN]>::try_from(iv.as_ref()).map_err(|_| wrong("nonce"))?;
        Ok(Self { key: LessSafeKey::new(key), iv: iv.into() })
    }

    /// Seals `record`, a header's room, content, and room for type and tag, as record number `sequence`.
    pub(super) fn seal(&self, record: &mut [u8], typ: ContentType, sequence: u64) -> Result<(), Error> {
        let (header, body) = record.split_at_mut(HEADER);
        let aad = make_tls13_aad(body.len());
        header.copy_from_slice(&aad);
        let (content, tag) = body.split_at_mut(body.len() - TAG);
        content[content.len() - 1] = typ.into();
        let made = self
            .key
            .seal_in_place_separate_tag(self.nonce(sequence), Aad::from(aad), content)
            .map_err(|_| Error::EncryptError)?;
        tag.copy_from_slice(made.as_ref());
        Ok(())
    }

    /// Opens `body`, a record without its header, as record number `sequence`: its type, and how much content is now at the start of `body`.
    pub(super) fn open(&self, body: &mut [u8], sequence: u64) -> Result<(ContentType, usize), Error> {
        let aad = Aad::from(make_tls13_aad(body.len()));
        let inner = self.key.open_in_place(self.nonce(sequence), aad, body).map_err(|_| Error::DecryptError)?;
        let message = InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, inner);
        let plain = message.into_tls13_unpadded_message()?;
        Ok((plain.typ, plain.payload.len()))
    }

    fn nonce(&self, sequence: u64) -> aead::Nonce {
        aead::Nonce::assume_unique_for_key(Nonce::new(&self.iv, sequence).0)
    }
}
