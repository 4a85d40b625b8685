//! The node's configuration: any text is a model or a bounded, printable message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass::sources::file::parse;

fuzz_target!(|text: &str| {
    match parse("fuzz.yaml", text) {
        Ok(config) => {
            // What was accepted can be used: every captured address leads somewhere.
            for address in config.snapshot.captured_addresses() {
                assert!(!matches!(config.snapshot.resolve(address), underpass::mesh::Resolution::Unknown));
            }
        }
        Err(e) => {
            assert!(e.0.starts_with("fuzz.yaml") && e.0.len() < 8192, "{e:?}");
            assert!(!e.0.chars().any(char::is_control), "{e:?}");
        }
    }
});
