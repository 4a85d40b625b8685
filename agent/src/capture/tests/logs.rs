//! What the programs report reaches `tracing`.

use std::{
    io,
    sync::{Arc, Mutex},
};

use super::{
    super::{Capture, CaptureOptions, TcMode},
    lab::{Connected, PEER, until},
    scene::{PORT, Scene},
};

/// Lines of this test's thread.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn have(&self, what: &[&str]) -> bool {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().any(|line| what.iter().all(|w| line.contains(w)))
    }
}

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tasks run on the thread of the test, where the subscriber is.
fn subscribe() -> (Lines, tracing::subscriber::DefaultGuard) {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(move || writer.clone())
        .finish();
    (lines, tracing::subscriber::set_default(subscriber))
}

#[tokio::test]
async fn a_refusal_is_logged() {
    let (lines, _guard) = subscribe();
    let scene = Scene::new().await;
    let capture = scene.start(TcMode::Auto).await;
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    assert_eq!(scene.dial(false).await, Connected::TimedOut);
    let destination = format!("{PEER}:{PORT}");
    until("the drop is logged", || lines.have(&["WARN", " bpf: ", "guard_dropped", "pod=1", &destination])).await;
}

#[tokio::test]
async fn lines_of_the_programs_are_logged() {
    let (lines, _guard) = subscribe();
    let scene = Scene::new().await;
    let capture = Capture::start(CaptureOptions { bpf_log: true, ..scene.lab.options() }).await.unwrap();
    scene.apply(&capture);
    let _pod = capture.enroll(&scene.web, None).await.unwrap();
    assert_eq!(scene.dial(true).await, Connected::Yes);
    until("the line is logged", || lines.have(&[" bpf: ", "captured connect to", PEER])).await;
}
