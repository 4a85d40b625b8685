//! What a test prints, as far as it is kept.

use std::{
    collections::VecDeque,
    io::{PipeReader, Read},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, channel},
    },
    time::Duration,
};

use vm_guest::OUTPUT_BYTES;

/// How long the last output of a test that has ended may take to be read.
const DRAIN: Duration = Duration::from_secs(5);

/// The end of what comes out of a pipe.
pub(crate) struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    end: Receiver<()>,
}

impl Tail {
    /// Reads until the end of the pipe, on a thread of its own.
    pub(crate) fn of(mut pipe: PipeReader) -> Self {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let shared = Arc::clone(&kept);
        let (send, end) = channel::<()>();
        std::thread::spawn(move || {
            // Dropped with the thread, which is what the other side waits for.
            let _end = send;
            let mut buffer = vec![0; 16 << 10];
            while let Ok(read @ 1..) = pipe.read(&mut buffer) {
                let mut kept = shared.lock().expect("nothing panics while holding it");
                kept.extend(&buffer[..read]);
                let over = kept.len().saturating_sub(OUTPUT_BYTES);
                kept.drain(..over);
            }
        });
        Self { kept, end }
    }

    /// What was kept. Complete unless a process that left the test's group still holds the pipe.
    pub(crate) fn text(self) -> String {
        let _ = self.end.recv_timeout(DRAIN);
        let mut kept = self.kept.lock().expect("nothing panics while holding it");
        String::from_utf8_lossy(kept.make_contiguous()).into_owned()
    }
}
