//! The wrapper around an agent, with a script in the agent's place that keeps to the same command line.

use std::{os::unix::fs::PermissionsExt, path::PathBuf, time::Duration};

use anyhow::Result;
use testbed::{Agent, AgentOptions, MeshConfig, Mode, Testbed};

const SOON: Duration = Duration::from_secs(20);

/// `run` says where it is and waits for SIGTERM; `status` answers while a `run` lives that is ready.
const SCRIPT: &str = r#"#!/bin/sh
command=$1
while [ $# -gt 0 ]; do
    case $1 in
        --run-dir) run=$2 ;;
        --pin-root) pins=$2 ;;
        --netns) echo "netns $2" >> "$(dirname "$0")/cleaned" ;;
    esac
    shift
done
case $command in
    run)
        mkdir -p "$pins"
        readlink /proc/self/ns/net >&2
        cat /proc/self/cgroup >&2
        trap 'exit 0' TERM
        echo $$ > "$run/pid"
        echo started >&2
        while :; do sleep 1000 & wait $!; done ;;
    status) kill -0 "$(cat "$run/pid")" && printf '{"pods": [{"workload": "default/web", "state": "%s", "reason": "because"}], "counters": {"agent": {"tunnels_in": 3}}}\n' STATE ;;
    connections) echo '{"total": 0, "connections": []}' ;;
    cleanup) rmdir "$pins" ;;
esac
"#;

fn script(testbed: &Testbed, state: &str) -> Result<PathBuf> {
    let path = testbed.dir().join("underpass");
    std::fs::write(&path, SCRIPT.replace("STATE", state))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn an_agent_is_started_asked_and_stopped() -> Result<()> {
    let testbed = Testbed::new("agent")?;
    let node = testbed.node("b");
    let web = node.pod("web")?;
    let mut mesh = MeshConfig::new(testbed.dir().join("ca"));
    mesh.enroll(&web).mode = Some(Mode::Strict);
    mesh.service("web", 1, &[(80, 8080)], &[&web]);

    let mut agent = Agent::start(node, &script(&testbed, "enrolled")?, &mesh.document(node), AgentOptions::default())?;
    let log = agent.log();
    let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(node.namespace().path())?);
    assert!(log.contains(&format!("net:[{inode}]")), "in the node's namespace: {log}");
    assert!(log.contains(&format!("/underpass-{}/b/node", testbed.id())), "outside the pods' cgroup: {log}");
    assert_eq!(agent.counters()?["agent"]["tunnels_in"], 3);
    assert_eq!(agent.connections()?["total"], 0);
    assert!(agent.pin_root().exists());

    agent.kill()?;
    assert!(agent.pin_root().exists(), "a killed agent leaves its pins");
    agent.restart()?;
    agent.stop()?;
    let pins = agent.pin_root();
    drop(agent);
    assert!(!pins.exists(), "removed by `underpass cleanup`");
    let cleaned = std::fs::read_to_string(testbed.dir().join("cleaned"))?;
    assert_eq!(cleaned, format!("netns {}\n", web.namespace().path().display()));
    Ok(())
}

#[test]
fn a_refused_pod_is_an_error_at_once() -> Result<()> {
    let testbed = Testbed::new("refused")?;
    let node = testbed.node("a");
    let mut mesh = MeshConfig::new(testbed.dir().join("ca"));
    mesh.enroll(&node.pod("web")?);
    let started = Agent::start(node, &script(&testbed, "refused")?, &mesh.document(node), AgentOptions::default());
    let error = format!("{:#}", started.err().expect("the pod was refused"));
    assert!(error.contains("default/web") && error.contains("because"), "{error}");
    Ok(())
}

#[test]
fn an_agent_that_ends_is_noticed() -> Result<()> {
    let testbed = Testbed::new("ends")?;
    let path = testbed.dir().join("underpass");
    std::fs::write(&path, "#!/bin/sh\necho no such thing >&2\nexit 3\n")?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    let begin = std::time::Instant::now();
    let started = Agent::start(testbed.node("a"), &path, "not: json", AgentOptions::default());
    let error = format!("{:#}", started.err().expect("it ended"));
    assert!(error.contains("exit status: 3") && error.contains("no such thing"), "{error}");
    assert!(begin.elapsed() < SOON);
    Ok(())
}

#[test]
fn each_node_enrols_its_own_pods_only() -> Result<()> {
    let testbed = Testbed::new("config")?;
    let (near, far) = (testbed.node("a").pod("near")?, testbed.node("b").pod("far")?);
    let mut mesh = MeshConfig::new("/ca");
    mesh.enroll(&near);
    mesh.enroll(&far);
    let document: serde_json::Value = serde_json::from_str(&mesh.document(testbed.node("a")))?;
    assert_eq!(document["issuer"]["local"]["caDir"], "/ca");
    assert_eq!(document["workloads"][0]["enroll"]["cgroup"], near.cgroup().display().to_string());
    assert_eq!(document["workloads"][1]["enroll"], serde_json::Value::Null);
    assert_eq!(document["workloads"][1]["addresses"][0], far.ipv4().to_string());
    Ok(())
}
