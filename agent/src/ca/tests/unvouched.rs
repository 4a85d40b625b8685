//! Pods that nobody vouches for, and pods that have outlived their identity.

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tonic::Code;

use super::{
    Lines, Raw, Replica,
    cluster::{agent, pod},
    eventually, settings, two_nodes,
};

/// A pod in namespace `payments` on node n1.
fn payments(name: &str, change: impl FnOnce(&mut Value)) -> Pod {
    let mut value = serde_json::to_value(pod("payments", name, name, "n1")).unwrap();
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

fn spiffe(account: &str) -> String {
    format!("spiffe://td.test/ns/payments/sa/{account}")
}

fn mirror(value: &mut Value) {
    value["metadata"]["annotations"] = json!({ "kubernetes.io/config.mirror": "h", "kubernetes.io/config.hash": "h", "kubernetes.io/config.source": "file" });
}

fn ago(seconds: i64) -> String {
    let at = time::OffsetDateTime::now_utc() - time::Duration::seconds(seconds);
    at.format(&time::format_description::well_known::Rfc3339).unwrap()
}

/// A kubelet may create a mirror pod in every namespace, on its own node.
#[tokio::test]
async fn nothing_is_signed_for_pods_that_nobody_vouches_for() {
    for watched in [true, false] {
        let lines = Lines::default();
        let _recording = lines.record();
        let cluster = two_nodes();
        let without_account =
            |value: &mut Value| drop(value["spec"].as_object_mut().unwrap().remove("serviceAccountName"));
        cluster.add_pod(&payments("m", |value| {
            mirror(value);
            without_account(value);
        }));
        cluster.add_pod(&payments("named", mirror));
        cluster.add_pod(&payments("sourced", |value| {
            value["metadata"]["annotations"] = json!({ "kubernetes.io/config.source": "http" });
        }));
        cluster.add_pod(&payments("owned", |value| {
            value["metadata"]["ownerReferences"] =
                json!([{ "apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "uid-n1" }]);
        }));
        cluster.add_pod(&payments("nameless", |value| value["metadata"]["uid"] = json!("")));
        cluster.add_pod(&payments("host", |value| value["spec"]["hostNetwork"] = json!(true)));
        cluster.add_pod(&payments("pending", |value| value["spec"]["nodeName"] = json!("")));
        cluster.add_pod(&payments("failed", |value| value["status"]["phase"] = json!("Failed")));
        cluster.add_pod(&payments("over", |value| {
            value["metadata"]["deletionTimestamp"] = json!(ago(301));
        }));
        // The controls.
        cluster.add_pod(&payments("ending", |value| {
            value["metadata"]["deletionTimestamp"] = json!(ago(200));
        }));
        cluster.add_pod(&payments("web", |_| {}));
        cluster.deny("watch", "pods", !watched);
        cluster.deny("list", "pods", false);
        let replica = Replica::start(&cluster, settings()).await;
        let raw = Raw::new(&cluster, &replica).await;
        let token = cluster.agent_token("agent-n1");

        for (account, reason, said) in [
            ("default", "static-pod", "static pods have no identity"),
            ("named", "static-pod", "static pods have no identity"),
            ("sourced", "static-pod", "static pods have no identity"),
            ("owned", "static-pod", "static pods have no identity"),
            ("nameless", "no-uid", "a pod without UID"),
            ("host", "host-network", "hostNetwork"),
            ("pending", "not-on-node", "no pod with"),
            ("failed", "not-on-node", "no pod with"),
            ("over", "deleted-pod", "grace period"),
        ] {
            let identity = spiffe(account);
            let mut answer = None;
            // Questions to the API server have a rate.
            eventually(account, async || {
                let status = raw.ask(&token, &identity).await;
                let busy = status.as_ref().is_err_and(|status| status.code() == Code::ResourceExhausted);
                answer = Some(status);
                !busy
            })
            .await;
            let refused = answer.unwrap().err().unwrap_or_else(|| panic!("{account} was signed"));
            assert_eq!(refused.code(), Code::PermissionDenied, "{account}: {refused}");
            assert!(refused.message().contains(said), "{account}: {refused}");
            let audit = lines.with("underpass::audit");
            let line = audit.iter().rfind(|line| line.contains(&identity) && !line.contains("pods-rate"));
            let line = line.unwrap_or_else(|| panic!("no line about {account}: {audit:#?}"));
            assert!(line.contains("refused") && line.contains(&format!("reason={reason:?}")), "{account}: {line}");
        }
        for account in ["web", "ending"] {
            let identity = spiffe(account);
            eventually(account, async || raw.ask(&token, &identity).await.is_ok()).await;
        }
    }
}

/// A pod that becomes one of these, and a mirror pod under the name of one that is gone.
#[tokio::test]
async fn an_identity_ends_with_what_it_rests_on() {
    let cluster = two_nodes();
    cluster.add_pod(&payments("web", |_| {}));
    cluster.add_pod(&payments("db", |_| {}));
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    let token = cluster.agent_token("agent-n1");
    for account in ["web", "db"] {
        raw.ask(&token, &spiffe(account)).await.unwrap();
    }
    cluster.add_pod(&payments("web", |value| value["metadata"]["deletionTimestamp"] = json!(ago(400))));
    cluster.delete("pods", "payments", "db");
    cluster.add_pod(&payments("db", mirror));
    for account in ["web", "db"] {
        let refused = async || {
            raw.ask(&token, &spiffe(account)).await.is_err_and(|status| status.code() == Code::PermissionDenied)
        };
        eventually(account, refused).await;
    }
}

/// The agent itself: its pod is real, and it is where its token says.
#[tokio::test]
async fn an_agents_token_fits_its_pod_and_its_node() {
    let cluster = two_nodes();
    let hosted = |name: &str, node: &str, change: &dyn Fn(&mut Value)| {
        let mut value = serde_json::to_value(pod("mesh", name, "underpass", node)).unwrap();
        value["spec"]["hostNetwork"] = json!(true);
        change(&mut value);
        serde_json::from_value::<Pod>(value).unwrap()
    };
    cluster.add_pod(&hosted("agent-n1", "n1", &|_| {}));
    cluster.add_pod(&hosted("agent-m", "n1", &mirror));
    let replica = Replica::start(&cluster, settings()).await;
    let raw = Raw::new(&cluster, &replica).await;
    let web = "spiffe://td.test/ns/default/sa/web";

    let on = |node: Value| {
        let mut token = agent("agent-n1");
        token.node = Some(node);
        cluster.token(token)
    };
    raw.ask(&on(json!(["n1"])), web).await.expect("the control");
    for node in [json!(["n2"]), json!([]), json!(["n1", "n2"]), json!([""])] {
        let refused = raw.ask(&on(node.clone()), web).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{node}: {refused}");
        assert!(refused.message().contains("on another node"), "{node}: {refused}");
    }
    let refused = raw.ask(&cluster.agent_token("agent-m"), web).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    assert!(refused.message().contains("static pods have no identity"), "{refused}");

    // Its own identity rests on the review, although its pod has hostNetwork.
    let own = "spiffe://td.test/ns/mesh/sa/underpass";
    assert_eq!(raw.ask(&cluster.agent_token("agent-n1"), own).await.unwrap().identity.to_string(), own);
}
