//! Records of the `EVENTS` ring buffer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass::capture::events::parse_event;

fuzz_target!(|record: &[u8]| {
    if let Ok(event) = parse_event(record) {
        assert_ne!(event.name(), "unknown");
        assert_eq!(record.len(), 48);
        // Addresses are what the programs wrote: a v4-mapped one is shown as IPv4, so two forms never mean one address.
        for end in [event.source, event.destination] {
            assert_eq!(end.ip(), end.ip().to_canonical());
        }
    }
});
