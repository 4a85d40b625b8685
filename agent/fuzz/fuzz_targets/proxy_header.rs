//! The PROXY v2 reader on foreign bytes: never panics, never reads past the end, and what it accepts survives being
//! written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass::tunnel::native::{MAX_HEADER, decode, encode};

fuzz_target!(|data: &[u8]| {
    match decode(data) {
        Ok(Some((preamble, length))) => {
            assert!(length <= data.len() && length <= MAX_HEADER);
            let again = encode(&preamble);
            assert_eq!(decode(&again), Ok(Some((preamble, again.len()))));
            for cut in 0..length {
                assert_eq!(decode(&data[..cut]), Ok(None), "a prefix of a good header is incomplete, not wrong");
            }
        }
        Ok(None) => assert!(data.len() < MAX_HEADER),
        Err(reason) => assert!(!reason.is_empty()),
    }
});
