//! What leaves say.

use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyUsagePurpose, SanType, SerialNumber};

use crate::mesh::SpiffeId;

/// Certificates start this long before they are issued, so that a peer whose clock is a little behind accepts them.
pub(crate) const BACKDATE: Duration = Duration::from_mins(1);

/// A workload's certificate: its only name is `identity`. Never outlives `signer_not_after`.
pub(crate) fn workload(
    identity: &SpiffeId,
    lifetime: Duration,
    now: SystemTime,
    signer_not_after: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    let names = vec![SanType::URI(identity.to_string().try_into()?)];
    let usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    Ok(leaf(names, usages, lifetime, now, signer_not_after))
}

/// A server's certificate for DNS names.
pub(crate) fn server(
    names: &[String],
    lifetime: Duration,
    now: SystemTime,
    signer_not_after: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    let names = names.iter().map(|name| Ok(SanType::DnsName(name.as_str().try_into()?)));
    let names = names.collect::<Result<_, rcgen::Error>>()?;
    Ok(leaf(names, vec![ExtendedKeyUsagePurpose::ServerAuth], lifetime, now, signer_not_after))
}

fn leaf(
    names: Vec<SanType>,
    usages: Vec<ExtendedKeyUsagePurpose>,
    lifetime: Duration,
    now: SystemTime,
    signer_not_after: SystemTime,
) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.serial_number = Some(serial());
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = usages;
    params.use_authority_key_identifier_extension = true;
    params.not_before = (now - BACKDATE.min(lifetime / 10)).into();
    params.not_after = (now + lifetime).min(signer_not_after).into();
    params
}

/// 127 random bits: positive, as RFC 5280 (section 4.1.2.2) wants it.
pub(crate) fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] &= 0x7f;
    SerialNumber::from_slice(&bytes)
}
