//! What a test prints, as far as it is kept.

use std::{
    collections::VecDeque,
    io::{PipeReader, Read},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use vm_guest::OUTPUT_BYTES;

/// The end of what comes out of a pipe.
pub(crate) struct Tail {
    kept: Arc<Mutex<VecDeque<u8>>>,
    thread: JoinHandle<()>,
}

impl Tail {
    /// Reads until the end of the pipe, on a thread of its own.
    pub(crate) fn of(mut pipe: PipeReader) -> Self {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let shared = Arc::clone(&kept);
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            while let Ok(read @ 1..) = pipe.read(&mut buffer) {
                let mut kept = shared.lock().expect("nothing panics while holding it");
                kept.extend(&buffer[..read]);
                let over = kept.len().saturating_sub(OUTPUT_BYTES);
                kept.drain(..over);
            }
        });
        Self { kept, thread }
    }

    /// What was kept, complete once no process has the pipe any more. A daemon may hold it for ever, so `complete` says whether
    /// all of them are known to be gone.
    pub(crate) fn text(self, complete: bool) -> String {
        if complete {
            // A panic there loses nothing that matters more than the test's own result.
            let _ = self.thread.join();
        }
        let mut kept = self.kept.lock().expect("nothing panics while holding it");
        String::from_utf8_lossy(kept.make_contiguous()).into_owned()
    }
}
