//! What agents send to `underpass ca`: the message, the identity in its metadata, and the signing request.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use underpass::{
    ca::{csr, impersonated},
    identity::istio::wire::IstioCertificateRequest,
    mesh::SpiffeId,
};

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 3 {
        // The message as it comes from the network; prost is what reads it.
        0 => {
            if let Ok(request) = IstioCertificateRequest::decode(data) {
                if let Ok(Some(text)) = impersonated(request.metadata.as_ref()) {
                    named(text);
                }
                keyed(&request.csr);
            }
        }
        // PEM, and DER without the armour: what is behind it is the interesting part.
        1 => keyed(&String::from_utf8_lossy(data)),
        _ => keyed(&armoured(data)),
    }
});

/// Whatever is accepted is written as it is read.
fn named(text: &str) {
    match text.parse::<SpiffeId>() {
        Ok(identity) => assert_eq!(identity.to_string(), text),
        Err(error) => assert!(error.to_string().len() < 1024),
    }
}

fn keyed(text: &str) {
    match csr::public_key(text) {
        // Accepted was verified, so the fuzzer would have had to sign: only seeds get here.
        Ok(_) => assert!(text.len() <= csr::MAX_CSR),
        Err(reason) => assert!(!reason.is_empty() && reason.len() < 1024, "{reason}"),
    }
}

fn armoured(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der))
}
