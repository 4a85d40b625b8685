//! What has to hold whatever the values are.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    cases,
    golden::MONITORING,
    helm::chart,
    objects::{Objects, container, pod},
};

fn each(mut check: impl FnMut(&str, &Objects) -> Result<()>) -> Result<()> {
    for (name, values) in cases::all() {
        check(&name, &Objects::of(&values)?).with_context(|| format!("case {name}"))?;
    }
    Ok(())
}

/// Others look for them by these names: commands in the documentation, the agent, the clean-up.
#[test]
fn objects_have_the_names_that_others_know() -> Result<()> {
    let names = Objects::of("")?.names();
    for name in [
        "DaemonSet/underpass-agent",
        "Deployment/underpass-ca",
        "Service/underpass-ca",
        "ServiceAccount/underpass-agent",
        "ServiceAccount/underpass-ca",
        "ServiceAccount/underpass-uninstall",
        "ConfigMap/underpass-config",
        "ConfigMap/underpass-ca-root",
        "ConfigMap/underpass-uninstall",
        "Secret/underpass-ca",
        "PodDisruptionBudget/underpass-ca",
        "NetworkPolicy/underpass-ca",
        "Job/underpass-uninstall",
        "Pod/underpass-self-test",
    ] {
        ensure!(names.iter().any(|other| other == name), "{name} is not in {names:?}");
    }
    each(|_, objects| {
        let names = objects.names();
        let different: BTreeSet<_> = names.iter().collect();
        ensure!(different.len() == names.len(), "twice the same: {names:?}");
        Ok(())
    })
}

/// The agent's tests try every verb that is not in these files.
#[test]
fn rights_are_those_that_the_agents_tests_prove() -> Result<()> {
    let mut proven = Vec::new();
    for file in ["agent.yaml", "ca.yaml", "uninstall.yaml"] {
        let text = std::fs::read_to_string(chart().join("files/rbac").join(file))?;
        let objects = Objects::read(&text)?.0;
        proven.extend(objects.into_iter().filter(|object| object["rules"].is_array()));
    }
    let same = |role: &Value| {
        let same =
            |other: &&Value| other["kind"] == role["kind"] && other["metadata"]["name"] == role["metadata"]["name"];
        proven.iter().find(same).with_context(|| format!("no file has {}", role["metadata"]["name"]))
    };
    let mut seen = BTreeSet::new();
    each(|name, objects| {
        for role in objects.0.iter().filter(|object| object["rules"].is_array()) {
            seen.insert(role["metadata"]["name"].to_string() + &role["kind"].to_string());
            // Another Secret than the files name; see the next test.
            if !["everything", "cert-manager"].contains(&name) || role["metadata"]["name"] != "underpass-ca" {
                ensure!(role["rules"] == same(role)?["rules"], "{role}");
            }
        }
        Ok(())
    })?;
    ensure!(seen.len() == proven.len(), "rendered {seen:?} of {}", proven.len());
    Ok(())
}

#[test]
fn a_secret_of_somebody_elses_is_only_read() -> Result<()> {
    let secrets = |values: &str| -> Result<Value> {
        let objects = Objects::of(values)?;
        let rules = objects.get("Role", "underpass-ca")?["rules"].as_array().context("rules")?.clone();
        let mut secrets = rules.into_iter().filter(|rule| rule["resources"] == json!(["secrets"]));
        secrets.next().context("a rule about Secrets")
    };
    let rule = secrets(cases::CERT_MANAGER)?;
    ensure!(rule["resourceNames"] == json!(["underpass-issuer"]) && rule["verbs"] == json!(["get", "list", "watch"]));
    let rule = secrets(cases::EVERYTHING)?;
    ensure!(rule["resourceNames"] == json!(["our-root"]), "{rule}");
    ensure!(rule["verbs"] == json!(["get", "list", "watch", "update"]), "{rule}");
    for values in [cases::CERT_MANAGER, cases::EVERYTHING] {
        ensure!(Objects::of(values)?.find("Secret", "underpass-ca").is_none());
    }
    Ok(())
}

/// Every binding leads to a role and an account that are there, in the release's namespace.
#[test]
fn bindings_lead_somewhere() -> Result<()> {
    each(|_, objects| {
        for binding in objects.0.iter().filter(|object| object["roleRef"].is_object()) {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (kind, name) = (text(&binding["roleRef"]["kind"]), text(&binding["roleRef"]["name"]));
            ensure!(objects.find(&kind, &name).is_some() || name.starts_with("system:openshift:"), "{binding}");
            let subject = &binding["subjects"][0];
            objects.get("ServiceAccount", &text(&subject["name"]))?;
            ensure!(subject["namespace"] == "underpass-system", "{binding}");
        }
        Ok(())
    })
}

/// What the mesh is made of must not need the mesh, except the pod that tests it.
#[test]
fn our_own_pods_are_not_in_the_mesh() -> Result<()> {
    each(|_, objects| {
        for object in objects.0.iter().filter(|object| pod(object)["spec"]["containers"].is_array()) {
            let mode = if object["kind"] == "Pod" { "enabled" } else { "disabled" };
            ensure!(pod(object)["metadata"]["labels"]["underpass.io/mode"] == mode, "{object}");
        }
        Ok(())
    })
}

/// A port of a container on the host's network is the node's, and a second agent beside the first could not be scheduled.
#[test]
fn two_agents_fit_on_a_node() -> Result<()> {
    each(|_, objects| {
        let agent = objects.get("DaemonSet", "underpass-agent")?;
        ensure!(pod(agent)["spec"]["hostNetwork"] == true && container(agent)["ports"].is_null(), "{agent}");
        Ok(())
    })
}

/// Everything but the agent would be let into a namespace with the Pod Security level "restricted".
#[test]
fn only_the_agent_has_rights_on_the_node() -> Result<()> {
    each(|name, objects| {
        for object in objects.0.iter().filter(|object| pod(object)["spec"]["containers"].is_array()) {
            if object["kind"] == "DaemonSet" {
                let context = &container(object)["securityContext"];
                let hardened = ["hardened", "everything"].contains(&name);
                ensure!(context["privileged"] == !hardened, "{context}");
                ensure!(context["capabilities"].is_object() == hardened, "{context}");
                continue;
            }
            let (spec, context) = (&pod(object)["spec"], &container(object)["securityContext"]);
            ensure!(spec["hostNetwork"].is_null() && spec["hostPID"].is_null(), "{object}");
            ensure!(spec["securityContext"]["runAsNonRoot"] == true, "{object}");
            ensure!(spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", "{object}");
            ensure!(
                context["allowPrivilegeEscalation"] == false && context["readOnlyRootFilesystem"] == true,
                "{object}"
            );
            ensure!(context["capabilities"] == json!({ "drop": ["ALL"] }), "{object}");
            let volumes = spec["volumes"].as_array().into_iter().flatten();
            ensure!(volumes.clone().all(|volume| volume["hostPath"].is_null()), "{object}");
        }
        Ok(())
    })
}

/// Helm leaves alone what it never wrote; keys that a manifest has are put back to what it says.
#[test]
fn what_others_write_is_installed_without_data() -> Result<()> {
    let objects = Objects::of("")?;
    for (kind, name) in
        [("Secret", "underpass-ca"), ("ConfigMap", "underpass-ca-root"), ("ConfigMap", "underpass-uninstall")]
    {
        let object = objects.get(kind, name)?;
        ensure!(object["data"].is_null() && object["stringData"].is_null(), "{object}");
    }
    let keep = &objects.get("Secret", "underpass-ca")?["metadata"]["annotations"]["helm.sh/resource-policy"];
    ensure!(keep == "keep", "the root would go with the release: {keep}");
    Ok(())
}

#[test]
fn the_token_is_for_the_authority_that_gets_it() -> Result<()> {
    let audience = |values: &str| -> Result<Value> {
        let objects = Objects::of(values)?;
        let agent = objects.get("DaemonSet", "underpass-agent")?;
        let volumes = pod(agent)["spec"]["volumes"].as_array().context("volumes")?;
        let token = volumes.iter().find(|volume| volume["name"] == "token").context("a token")?;
        Ok(token["projected"]["sources"][0]["serviceAccountToken"]["audience"].clone())
    };
    ensure!(audience("")? == "underpass-ca");
    ensure!(audience(cases::EXTERNAL)? == "istio-ca");
    let external = Objects::of(cases::EXTERNAL)?;
    ensure!(external.config()?["issuer"]["istio"]["address"] == "https://istiod.istio-system.svc:15012");
    let of_ca: Vec<_> = external.names().into_iter().filter(|name| name.contains("underpass-ca")).collect();
    ensure!(of_ca.is_empty(), "{of_ca:?}");
    Ok(())
}

#[test]
fn alerts_and_dashboard_are_the_files_word_by_word() -> Result<()> {
    let objects = Objects::of(MONITORING)?;
    let read = |name: &str| std::fs::read_to_string(chart().join("files").join(name));
    let rules: Value = serde_saphyr::from_str(&read("rules.yaml")?)?;
    ensure!(objects.get("PrometheusRule", "underpass")?["spec"] == rules);
    let dashboard = objects.get("ConfigMap", "underpass-dashboard")?["data"]["underpass.json"].as_str();
    let dashboard: Value = serde_json::from_str(dashboard.context("a dashboard")?)?;
    ensure!(dashboard == serde_json::from_str::<Value>(&read("dashboard.json")?)?);
    // What the monitors select is there, and has the port.
    for name in ["underpass-agent", "underpass-ca"] {
        let monitor = &objects.get("ServiceMonitor", name)?["spec"];
        let service = objects.get("Service", name)?;
        for (label, value) in monitor["selector"]["matchLabels"].as_object().context("labels")? {
            ensure!(service["metadata"]["labels"][label] == *value, "{name}: {label}");
        }
        let ports = service["spec"]["ports"].as_array().context("ports")?;
        ensure!(ports.iter().any(|port| port["name"] == monitor["endpoints"][0]["port"]), "{name}: {ports:?}");
    }
    Ok(())
}

/// They name workloads and identities.
#[test]
fn metrics_are_the_nodes_own_until_somebody_asks() -> Result<()> {
    for (values, address) in [
        ("", "127.0.0.1:15020"),
        ("monitoring: { expose: true }", "[::]:15020"),
        ("monitoring: { serviceMonitor: { enabled: true } }", "[::]:15020"),
        ("monitoring: { prometheusRule: { enabled: true } }\nagent: { ports: { metrics: 25020 } }", "127.0.0.1:25020"),
    ] {
        let arguments = Objects::of(values)?.arguments("DaemonSet", "underpass-agent")?;
        let wanted = format!("--metrics-addr={address}");
        ensure!(arguments.contains(&wanted), "{values}: {wanted} is not in {arguments:?}");
    }
    Ok(())
}
