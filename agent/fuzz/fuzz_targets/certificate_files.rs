//! Files about certificates: revocation lists, and what an earlier agent kept.
#![no_main]

use std::time::SystemTime;

use libfuzzer_sys::fuzz_target;
use underpass::identity::{kept, revocation};

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 3 {
        0 => listed(data),
        // DER without the armour: what is behind it is the interesting part.
        1 => listed(pem::encode(&pem::Pem::new("X509 CRL", data)).as_bytes()),
        _ => {
            let identity = "spiffe://td.test/ns/default/sa/web".parse().expect("an identity");
            if let Err(error) = kept::parse(data, &identity, b"", SystemTime::now()) {
                assert!(!error.is_empty());
            }
        }
    }
});

fn listed(bytes: &[u8]) {
    match revocation::parse(bytes) {
        Ok(lists) => assert!(!lists.is_empty() && lists.len() <= 64),
        Err(error) => assert!(!error.is_empty()),
    }
}
