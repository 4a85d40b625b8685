//! Cleaning up.

use std::path::PathBuf;

use super::{
    super::{TcMode, cleanup::cleanup, loader::HOOKS, maps::PINNED},
    lab::Lab,
    scene::Scene,
};

async fn everything_goes(tc: TcMode, filters: usize) {
    let scene = Scene::new().await;
    let pods = [PathBuf::from(scene.net.path())];
    let capture = scene.start(tc).await;
    // An agent that is killed undoes nothing; a pod that is leaked does not either.
    std::mem::forget(capture.enroll(&scene.web, None).await.unwrap().take_listeners());
    let pod = capture.pods().remove(0);
    std::mem::forget(pod);
    let error = cleanup(&scene.lab.pins, &pods, false).await.unwrap_err().to_string();
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    assert!(scene.has_rule(), "refused while an agent lives");
    drop(capture);

    // Nobody has to say which pods there were.
    let report = cleanup(&scene.lab.pins, &[], false).await.unwrap();
    assert_eq!((report.links, report.maps), (HOOKS.len() + 2 - filters, PINNED.len()));
    assert_eq!((report.filters, &report.namespaces[..]), (filters, &pods[..]));
    assert_eq!((report.versions.len(), &report.problems[..]), (1, &[][..]));
    assert!(!scene.lab.pins.exists());
    assert!(!scene.has_rule());
    assert_eq!(scene.filters(), 0);

    let again = cleanup(&scene.lab.pins, &pods, false).await.unwrap();
    assert_eq!((again.links, again.maps, again.filters, again.versions.len()), (0, 0, 0, 0));
    assert!(again.problems.is_empty(), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_goes_tcx() {
    everything_goes(TcMode::Tcx, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_goes_clsact() {
    everything_goes(TcMode::Clsact, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn force_does_not_ask_the_agent() {
    let lab = Lab::new();
    let _capture = lab.start().await;
    let report = cleanup(&lab.pins, &[], true).await.unwrap();
    assert_eq!(report.links, HOOKS.len());
    assert!(!lab.pins.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_gone_is_reported_and_stops_nothing() {
    let lab = Lab::new();
    drop(lab.start().await);
    let report = cleanup(&lab.pins, &[PathBuf::from("/run/netns/none-such")], false).await.unwrap();
    assert_eq!(report.links, HOOKS.len());
    assert!(report.problems.len() == 1 && report.problems[0].contains("none-such"), "{report:?}");
}
