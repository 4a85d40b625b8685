//! One root, several replicas.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    Files, LIMIT, Lines, Replica,
    cluster::{Cluster, Objects},
    eventually, identity, roots, settings, two_nodes,
};
use crate::{
    ca::RootSource,
    identity::{
        Issuer as _, Svid,
        authority::{Authority, ROOT_REPLACED_BEFORE, ROOT_VALIDITY, Rules},
    },
};

fn root_count(cluster: &Cluster) -> usize {
    roots(cluster).map_or(0, |pem| pem.matches("BEGIN CERTIFICATE").count())
}

/// Asks this replica.
async fn ask(cluster: &Cluster, replica: &Replica, files: &Files, name: &str) -> Svid {
    // Roots that were published after the files were written.
    std::fs::write(files.root_file(), roots(cluster).unwrap()).unwrap();
    files.issuer(replica.address).issue(&identity(name)).await.unwrap_or_else(|e| panic!("{e}"))
}

/// Do peers with `trusting`'s roots accept `svid`?
fn trusted(svid: &Svid, trusting: &Svid) -> bool {
    let joined = Svid { roots: Arc::clone(&trusting.roots), ..svid.clone() };
    joined.verify(SystemTime::now()).is_ok()
}

/// What another replica's Secret would hold.
fn foreign_root(objects: &mut Objects) {
    let rules = Rules {
        organisation: "Underpass",
        common_name: "other replica".into(),
        lifetime: Duration::from_hours(24),
        root_validity: ROOT_VALIDITY,
        replaced_before: ROOT_REPLACED_BEFORE,
    };
    let pem = Authority::create(&rules, SystemTime::now()).unwrap().pem();
    objects.put_secret("underpass-ca", &[("ca.crt", &pem.roots), ("ca.key", &pem.key)]);
}

#[tokio::test]
async fn replicas_share_one_root_and_replace_it_with_overlap() {
    let cluster = two_nodes();
    let mut settings = settings();
    settings.lifetime = Duration::from_secs(6);
    let (one, two) =
        (Replica::start(&cluster, settings.clone()).await, Replica::start(&cluster, settings.clone()).await);
    one.ready().await;
    two.ready().await;
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    let (first, other) = (ask(&cluster, &one, &files, "web").await, ask(&cluster, &two, &files, "web").await);
    assert_eq!(first.roots_id, other.roots_id, "both agree on one root");
    assert_eq!(first.roots.len(), 1);

    cluster.change(|objects| {
        let mut secret = cluster_secret(objects);
        secret["metadata"]["annotations"]["underpass.io/rotate-root"] = "now".into();
        objects.put("secrets", secret);
    });
    let asked = SystemTime::now();
    eventually("the new root is published", async || root_count(&cluster) == 2).await;
    let secret = cluster.object("secrets", "mesh", "underpass-ca").unwrap();
    assert!(secret["metadata"]["annotations"]["underpass.io/rotate-root"].is_null(), "it was done");
    let during = [ask(&cluster, &one, &files, "web").await, ask(&cluster, &two, &files, "web").await];
    for svid in &during {
        assert!(trusted(svid, &first), "still signed by the old root");
    }
    eventually("both distribute it", async || {
        let (a, b) = (ask(&cluster, &one, &files, "web").await, ask(&cluster, &two, &files, "web").await);
        a.roots.len() == 2 && a.roots_id == b.roots_id
    })
    .await;

    let new = loop {
        let svid = ask(&cluster, &one, &files, "web").await;
        if !trusted(&svid, &first) {
            break svid;
        }
        assert!(asked.elapsed().unwrap() < LIMIT);
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(asked.elapsed().unwrap() + Duration::from_secs(1) >= settings.lifetime, "not before the overlap is over");
    assert_eq!(new.roots.len(), 2, "the old root is still trusted");
    eventually("the other replica signs with it too", async || {
        !trusted(&ask(&cluster, &two, &files, "web").await, &first)
    })
    .await;
    eventually("the old root is gone", async || root_count(&cluster) == 1).await;
    assert!(asked.elapsed().unwrap() + Duration::from_secs(1) >= 3 * settings.lifetime);
    assert!(cluster.secret("underpass-ca", "next.key").is_none());
    assert!(
        trusted(&ask(&cluster, &two, &files, "web").await, &new),
        "who asked last before that trusts what is signed now"
    );
}

fn cluster_secret(objects: &Objects) -> serde_json::Value {
    objects.get("secrets", "mesh", "underpass-ca").expect("the root's Secret")
}

#[tokio::test]
async fn who_comes_second_takes_the_root_of_who_came_first() {
    // Created by another replica between our look and our creation, and the same with an empty Secret that is filled.
    for prepared in [false, true] {
        let cluster = two_nodes();
        if prepared {
            cluster.put_secret("underpass-ca", &[]);
        }
        cluster.intrude(foreign_root);
        let replica = Replica::start(&cluster, settings()).await;
        replica.ready().await;
        assert_eq!(cluster.count("conflict"), 1, "prepared: {prepared}");
        eventually("published", async || roots(&cluster).is_some()).await;
        let shared = String::from_utf8(cluster.secret("underpass-ca", "ca.crt").unwrap()).unwrap();
        assert_eq!(roots(&cluster).unwrap(), shared, "no second root was made");
        let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
        let issuer = ask(&cluster, &replica, &files, "web").await.describe().issuer;
        assert!(issuer.contains("other replica"), "{issuer}");
    }
}

#[tokio::test]
async fn a_deleted_secret_is_put_back() {
    let cluster = two_nodes();
    let replica = Replica::start(&cluster, settings()).await;
    replica.ready().await;
    let key = cluster.secret("underpass-ca", "ca.key").unwrap();
    let files = Files::new(&cluster, &cluster.agent_token("agent-n1")).await;
    let before = ask(&cluster, &replica, &files, "web").await;
    cluster.delete("secrets", "mesh", "underpass-ca");
    eventually("it is there again", async || cluster.secret("underpass-ca", "ca.key").is_some()).await;
    assert_eq!(cluster.secret("underpass-ca", "ca.key").unwrap(), key);
    assert_eq!(ask(&cluster, &replica, &files, "web").await.roots_id, before.roots_id);

    // A replica that may not do that goes on with what it has.
    cluster.deny("create", "secrets", true);
    cluster.delete("secrets", "mesh", "underpass-ca");
    assert_eq!(ask(&cluster, &replica, &files, "web").await.roots_id, before.roots_id);
    cluster.deny("create", "secrets", false);
    eventually("and puts it back when it may", async || cluster.secret("underpass-ca", "ca.key") == Some(key.clone()))
        .await;
}

#[tokio::test]
async fn secrets_that_cannot_be_used_are_explained() {
    let lines = Lines::default();
    let _recording = lines.record();
    let warned = async |what: &str| eventually(what, async || !lines.with(what).is_empty()).await;

    let cluster = two_nodes();
    cluster.deny("create", "secrets", true);
    let replica = Replica::start(&cluster, settings()).await;
    warned("create an empty one with kubectl -n mesh create secret generic underpass-ca").await;
    assert_eq!(replica.get("/healthz/ready").await.0, 503);
    cluster.put_secret("underpass-ca", &[("ca.crt", "x")]);
    warned("ca.key is missing but ca.crt is there").await;
    cluster.put_secret("underpass-ca", &[("ca.crt", "x"), ("ca.key", "y")]);
    warned("Secret mesh/underpass-ca: ca.crt: no PEM block").await;
    cluster.put_secret("underpass-ca", &[]);
    replica.ready().await;
    cluster.deny("get", "secrets", true);
    cluster.put_secret("underpass-ca", &[]);
    warned("its Role needs the verb get on this Secret").await;
    assert_eq!(replica.get("/healthz/ready").await.0, 200, "what it has still signs");
}

#[tokio::test]
async fn the_roots_are_published_and_kept_so() {
    let cluster = two_nodes();
    let mut settings = settings();
    settings.publish_to.push("elsewhere".into());
    let replica = Replica::start(&cluster, settings).await;
    replica.ready().await;
    eventually("published", async || roots(&cluster).is_some()).await;
    eventually("elsewhere too", async || cluster.object("configmaps", "elsewhere", "underpass-ca-root").is_some())
        .await;
    let secret = cluster.secret("underpass-ca", "ca.crt").unwrap();
    assert_eq!(roots(&cluster).unwrap().as_bytes(), secret);
    assert!(!roots(&cluster).unwrap().contains("PRIVATE"));
    assert!(matches!(super::settings().root, RootSource::Managed { .. }));
}
