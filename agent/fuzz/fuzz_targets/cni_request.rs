//! What comes in over the agent's socket for the plugin: a request that survives being sent again, or an error.
#![no_main]

use std::{io::Write as _, net::Shutdown, os::unix::net::UnixStream, time::Duration};

use libfuzzer_sys::fuzz_target;
use underpass_cni::protocol::{LIMIT, VERSION, parse_request, receive_request, send_request};

fuzz_target!(|bytes: &[u8]| {
    // More than the limit fits into a socket's buffer, so one thread does for both ends.
    let bytes = &bytes[..bytes.len().min(LIMIT + 1)];
    let (mut ours, theirs) = UnixStream::pair().expect("descriptors");
    theirs.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket");
    ours.write_all(bytes).expect("room in the buffer");
    ours.shutdown(Shutdown::Write).expect("a connected socket");
    let received = receive_request(&theirs);
    let parsed = parse_request(bytes);
    if bytes.len() > LIMIT {
        assert!(received.is_err());
        return;
    }
    let (Ok((request, None)), Ok(parsed)) = (&received, &parsed) else {
        let (received, parsed) = (received.expect_err("as parsed"), parsed.expect_err("as received"));
        assert_eq!((received.kind(), received.to_string()), (parsed.kind(), parsed.to_string()));
        return;
    };
    assert_eq!((request, request.version), (parsed, VERSION));
    let (ours, theirs) = UnixStream::pair().expect("descriptors");
    // Written out, escapes may make it longer than it came.
    if send_request(&ours, request, None).is_ok() {
        assert_eq!(&receive_request(&theirs).expect("what was sent").0, request);
    }
});
