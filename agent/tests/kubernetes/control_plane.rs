//! The control plane itself: what other tests rely on.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use testbed::{
    Process, Testbed,
    kube::{ControlPlane, User},
};

use crate::world::{World, eventually};

const SOON: Duration = Duration::from_secs(30);
/// The audience that the embedded authority will ask for.
const AUDIENCE: &str = "underpass-ca";

fn names(list: &Value) -> Vec<&str> {
    list["items"].as_array().into_iter().flatten().filter_map(|item| item["metadata"]["name"].as_str()).collect()
}

/// curl with a client certificate out of a kubeconfig is awkward; with a token it is not.
fn curl(command: &mut std::process::Command, plane: &ControlPlane, url: &str, token: &str) -> Result<Value> {
    let ca = plane.ca_file();
    command.args(["--silent", "--show-error", "--max-time", "20", "--cacert"]).arg(ca);
    command.arg("--header").arg(format!("Authorization: Bearer {token}")).arg(url);
    let text = Process::spawn(command)?.output(SOON)?.success()?;
    serde_json::from_str(&text).with_context(|| text.clone())
}

#[test]
fn nodes_pods_and_this_process_reach_the_api() -> Result<()> {
    let World { plane, bed } = World::new("kreach")?;
    let namespaces = plane.get(&["namespaces"])?;
    ensure!(names(&namespaces).contains(&"kube-system"), "{namespaces}");
    let token = plane.token("default", "default", &[], Duration::from_mins(10))?;
    let path = "/version";
    let pod = bed.node("b").pod("client")?;
    let far = format!("{}{path}", plane.url());
    for mut command in [bed.node("a").command("curl"), bed.node("b").command("curl"), pod.command("curl")] {
        ensure!(curl(&mut command, &plane, &far, &token)?["gitVersion"] == "v1.20.2");
    }
    let here = format!("{}{path}", plane.url_here());
    ensure!(curl(&mut std::process::Command::new("curl"), &plane, &here, &token)?["gitVersion"] == "v1.20.2");
    Ok(())
}

#[test]
fn users_may_do_what_their_roles_say() -> Result<()> {
    let World { plane, bed } = World::new("kusers")?;
    let list = ["get", "pods", "--all-namespaces"];
    let refused = plane.kubectl_as(&User::new("nobody"), &list, "")?;
    ensure!(!refused.status.success() && refused.stderr.contains("nobody"), "{refused:?}");
    plane.kubectl(&["create", "clusterrolebinding", "readers", "--clusterrole=view", "--group=readers"])?;
    eventually(SOON, || plane.kubectl_as(&User::new("somebody").in_group("readers"), &list, "")?.success())?;

    // A kubelet asks for tokens of the pods on its node only: NodeRestriction and the node authorizer are at work.
    plane.register(bed.node("a"))?;
    plane.register(bed.node("b"))?;
    let body = json!({ "kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": { "audiences": [AUDIENCE] } });
    let path = "/api/v1/namespaces/default/serviceaccounts/default/token";
    let request = ["create", "--raw", path, "--filename=-"];
    let refused = plane.kubectl_as(&User::node("a"), &request, &body.to_string())?;
    ensure!(!refused.status.success() && refused.stderr.contains("Forbidden"), "{refused:?}");

    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "web" },
        "spec": { "nodeName": "a", "containers": [{ "name": "web", "image": "web" }] },
    });
    plane.apply(&pod.to_string())?;
    let uid = plane.get(&["pod", "web"])?["metadata"]["uid"].clone();
    let mut bound = body;
    bound["spec"]["boundObjectRef"] = json!({ "kind": "Pod", "apiVersion": "v1", "name": "web", "uid": uid });
    // The node authorizer hears of the pod from a watch.
    let answer = eventually(SOON, || plane.kubectl_as(&User::node("a"), &request, &bound.to_string())?.success())?;
    let answer: Value = serde_json::from_str(&answer)?;
    let review = plane.review(answer["status"]["token"].as_str().context("a token")?, &[AUDIENCE])?;
    let extra = &review["user"]["extra"]["authentication.kubernetes.io/pod-name"];
    ensure!(review["authenticated"] == true && *extra == json!(["web"]), "{review}");
    let refused = plane.kubectl_as(&User::node("b"), &request, &bound.to_string())?;
    ensure!(!refused.status.success() && refused.stderr.contains("Forbidden"), "{refused:?}");
    Ok(())
}

#[test]
fn tokens_are_for_the_audience_that_was_asked_for() -> Result<()> {
    let World { plane, bed: _bed } = World::new("ktoken")?;
    plane.kubectl(&["create", "namespace", "shop"])?;
    plane.kubectl(&["create", "serviceaccount", "web", "--namespace=shop"])?;
    let token = plane.token("shop", "web", &[AUDIENCE], Duration::from_mins(10))?;
    let good = plane.review(&token, &[AUDIENCE])?;
    ensure!(good["authenticated"] == true && good["audiences"] == json!([AUDIENCE]), "{good}");
    ensure!(good["user"]["username"] == "system:serviceaccount:shop:web", "{good}");
    for audiences in [&["another"][..], &[]] {
        let bad = plane.review(&token, audiences)?;
        ensure!(bad["authenticated"] != true, "{audiences:?}: {bad}");
    }
    let general = plane.token("shop", "web", &[], Duration::from_mins(10))?;
    ensure!(plane.review(&general, &[])?["authenticated"] == true);
    ensure!(
        plane.review(&general, &[AUDIENCE])?["authenticated"] != true,
        "a token for the API is none for the authority"
    );
    plane.kubectl(&["delete", "serviceaccount", "web", "--namespace=shop"])?;
    // The API server remembers what it verified for some ten seconds.
    eventually(SOON, || {
        let gone = plane.review(&token, &[AUDIENCE])?;
        ensure!(gone["authenticated"] != true, "{gone}");
        Ok(())
    })
}

#[test]
fn controllers_make_pods_and_endpoints() -> Result<()> {
    let World { plane, bed } = World::new("kpods")?;
    for node in ["a", "b"] {
        plane.register(bed.node(node))?;
    }
    plane.kubectl(&["create", "deployment", "web", "--image=web", "--replicas=2"])?;
    plane.kubectl(&["expose", "deployment", "web", "--port=80", "--target-port=8080"])?;
    let pods = eventually(SOON, || {
        let pods = plane.get(&["pods", "--selector=app=web"])?;
        ensure!(names(&pods).len() == 2, "{pods}");
        Ok(pods)
    })?;
    let addresses: Vec<IpAddr> = vec!["10.77.1.10".parse()?, "10.77.2.10".parse()?];
    for ((name, node), address) in names(&pods).iter().zip(["a", "b"]).zip(&addresses) {
        plane.set_pod_running("default", name, node, &[*address])?;
    }
    let wanted: BTreeSet<_> = addresses.iter().map(ToString::to_string).collect();
    eventually(SOON, || {
        let slices = plane.get(&["endpointslices", "--selector=kubernetes.io/service-name=web"])?;
        let endpoints = slices["items"].as_array().into_iter().flatten();
        let endpoints = endpoints.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        let ready = endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true);
        let found: BTreeSet<_> =
            ready.filter_map(|endpoint| endpoint["addresses"][0].as_str().map(str::to_owned)).collect();
        ensure!(found == wanted, "{slices}");
        Ok(())
    })?;
    ensure!(plane.kubectl(&["get", "deployment", "web", "--output=jsonpath={.status.replicas}"])?.trim() == "2");
    Ok(())
}

#[test]
fn the_api_goes_and_comes_back_with_its_data() -> Result<()> {
    let World { mut plane, bed: _bed } = World::new("kaway")?;
    plane.kubectl(&["create", "configmap", "kept", "--from-literal=a=b"])?;
    let before = plane.get(&["configmap", "kept"])?;
    let watch = plane.kubectl_spawn(&["get", "configmaps", "--watch", "--output=name"])?;
    watch.wait_line("configmap/kept", SOON)?;
    let (url, here) = (plane.url(), plane.url_here());

    plane.stop_api()?;
    watch.wait(SOON).context("a watch ends with the API server")?;
    let refused = plane.kubectl(&["get", "namespaces", "--request-timeout=5s"]).unwrap_err();
    ensure!(refused.to_string().contains("refused"), "{refused:#}");

    plane.start_api()?;
    ensure!((url, here) == (plane.url(), plane.url_here()));
    ensure!(plane.get(&["configmap", "kept"])? == before);
    // Controllers go on: they were left alone.
    plane.kubectl(&["create", "namespace", "later"])?;
    eventually(Duration::from_mins(1), || plane.kubectl(&["get", "serviceaccount", "default", "--namespace=later"]))?;
    Ok(())
}

#[test]
fn who_was_away_for_too_long_is_told_so() -> Result<()> {
    let World { mut plane, bed: _bed } = World::new("kgone")?;
    let version = |plane: &ControlPlane| -> Result<String> {
        let list = plane.get_raw("/api/v1/configmaps?limit=1")?;
        Ok(list["metadata"]["resourceVersion"].as_str().context("a version")?.to_owned())
    };
    let resume = |plane: &ControlPlane, from: &str| {
        let path = format!("/api/v1/namespaces/default/configmaps?watch=true&timeoutSeconds=1&resourceVersion={from}");
        plane.kubectl(&["get", "--raw", &path])
    };
    let old = version(&plane)?;
    plane.kubectl(&["create", "configmap", "one", "--from-literal=a=b"])?;
    let events = resume(&plane, &old)?;
    ensure!(events.contains(r#""type":"ADDED""#) && events.contains(r#""name":"one""#), "it is remembered: {events}");

    // The memory of a new API server begins with its start.
    plane.restart_api_with(&[])?;
    ensure_gone(resume(&plane, &old)).context("an old version after a restart")?;

    // Without memory, etcd's is asked, and that can be shortened.
    plane.restart_api_with(&["--watch-cache=false"])?;
    let old = version(&plane)?;
    plane.kubectl(&["create", "configmap", "two", "--from-literal=a=b"])?;
    ensure!(resume(&plane, &old)?.contains(r#""name":"two""#));
    plane.kubectl(&["create", "configmap", "three", "--from-literal=a=b"])?;
    // A watch begins with the revision after the one that it names.
    let compacted = plane.compact_etcd()?;
    ensure!(compacted > old.parse::<u64>()? + 1, "{compacted} {old}");
    ensure_gone(resume(&plane, &old)).context("a compacted version")
}

/// The answer to a watch is 410 Gone, as a status or as its first event.
fn ensure_gone(answer: Result<String>) -> Result<()> {
    let text = answer.unwrap_or_else(|error| format!("{error:#}"));
    let gone = ["\"code\":410", "too old resource version", "revision has been compacted"];
    ensure!(gone.iter().any(|sign| text.contains(sign)), "{text}");
    Ok(())
}

#[test]
fn watches_end_when_the_server_is_told_so() -> Result<()> {
    let World { plane, bed: _bed } = World::with("kwatch", &["--min-request-timeout=2"])?;
    let watch = plane.kubectl_spawn(&["get", "--raw", "/api/v1/namespaces?watch=true"])?;
    watch.wait_line(r#""name":"kube-system""#, SOON)?;
    // Between the time given and twice as much.
    ensure!(watch.wait(SOON)?.success());
    Ok(())
}

#[test]
fn policies_are_served_in_both_versions() -> Result<()> {
    let World { plane, bed: _bed } = World::new("kcrds")?;
    plane.install_crds()?;
    let policy = |version: &str, name: &str| {
        json!({
            "apiVersion": format!("security.istio.io/{version}"), "kind": "AuthorizationPolicy", "metadata": { "name": name },
            "spec": { "action": "ALLOW", "rules": [{ "from": [{ "source": { "principals": ["a"] } }] }] },
        })
    };
    plane.apply(&policy("v1", "one").to_string())?;
    plane.apply(&policy("v1beta1", "two").to_string())?;
    for version in ["v1", "v1beta1"] {
        let list = plane.get_raw(&format!("/apis/security.istio.io/{version}/authorizationpolicies"))?;
        ensure!(names(&list).len() == 2, "{list}");
        let rules = &list["items"][1]["spec"]["rules"];
        ensure!(rules[0]["from"][0]["source"]["principals"] == json!(["a"]), "kept as it was: {list}");
    }
    let strict = json!({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": { "name": "default" },
        "spec": { "mtls": { "mode": "STRICT" } },
    });
    plane.apply(&strict.to_string())?;
    ensure!(plane.kubectl(&["get", "pa", "default"])?.contains("STRICT"));
    // Server-side apply, which Debian's compiler and the source's own reflection library do not survive together.
    let input = strict.to_string().replace("STRICT", "PERMISSIVE");
    let arguments = ["apply", "--server-side", "--force-conflicts", "--field-manager=test", "--filename=-"];
    plane.kubectl_as(&User::admin(), &arguments, &input)?.success()?;
    ensure!(plane.kubectl(&["get", "pa", "default"])?.contains("PERMISSIVE"));
    Ok(())
}

#[test]
fn nothing_is_left() -> Result<()> {
    let World { plane, bed } = World::new("kleft")?;
    let id = bed.id().to_owned();
    ensure!(!Testbed::leftovers(&id)?.is_empty());
    // In the wrong order, too.
    drop(bed);
    drop(plane);
    ensure!(Testbed::leftovers(&id)?.is_empty(), "{:?}", Testbed::leftovers(&id)?);
    Ok(())
}
