//! `ADD`: the pod starts when the agent has it, or when it is known that it need not.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use serde_json::Value;
use underpass_cni::{
    projection::Treatment,
    protocol::{self, Answer, Attachment, Command, PodName},
};

use super::world::{NETNS, Node, PATIENCE, namespace};

fn attachment() -> Attachment {
    Attachment {
        container: "c0ffee".into(),
        interface: "eth0".into(),
        netns: NETNS.into(),
        pod: PodName { namespace: "shop".into(), name: "web-0".into(), uid: Some("6f3c".into()) },
        addresses: vec!["10.1.2.3".parse().unwrap(), "fd00::3".parse().unwrap()],
    }
}

#[test]
fn the_agent_gets_the_pod_and_the_runtime_the_previous_result() {
    let node = Node::new();
    let (_agent, asked) = node.answering(Answer::Done { held: true });
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let outcome = node.call("ADD").edit(|config| config["cniVersion"] = version.into()).run();
        let mut expected = node.config()["prevResult"].take();
        expected["cniVersion"] = version.into();
        assert_eq!(outcome.result(), expected);
        assert_eq!(outcome.stderr, "");
        let asked = asked.recv_timeout(PATIENCE).unwrap();
        assert_eq!(asked.request.command, Command::Add(attachment()));
        assert_eq!(asked.namespace, Some(namespace()));
    }
}

#[test]
fn a_further_interface_is_handed_on_as_well() {
    let node = Node::new();
    let (_agent, asked) = node.answering(Answer::Done { held: false });
    node.call("ADD").set("CNI_IFNAME", "net1").run().result();
    let expected = Attachment { interface: "net1".into(), ..attachment() };
    assert_eq!(asked.recv_timeout(PATIENCE).unwrap().request.command, Command::Add(expected));
}

#[test]
fn exempt_namespaces_and_what_is_no_pod_pass_without_asking() {
    let node = Node::new();
    let (_agent, asked) = node.answering(Answer::Refused { message: "asked".into(), retry: false });
    let expected = node.config()["prevResult"].take();
    assert_eq!(node.call("ADD").pod("kube-system").run().result(), expected);
    assert_eq!(node.call("ADD").set("CNI_ARGS", "IgnoreUnknown=1;FOO=bar").run().result(), expected);
    assert_eq!(node.call("ADD").unset("CNI_ARGS").run().result(), expected);
    node.call("CHECK").pod("kube-system").run().nothing();
    node.call("DEL").pod("kube-system").run().nothing();
    assert!(asked.try_recv().is_err());
}

/// The kubelet's own pods, of which some have to run before any agent can: known by their UID, which nobody can choose.
#[test]
fn static_pods_pass_without_asking() {
    let node = Node::new();
    let args = |uid: &str| format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=etcd-node-a;K8S_POD_UID={uid}");
    let (hash, uuid) = ("0123456789abcdef0123456789ABCDEF", "01234567-89ab-4def-8123-456789abcdef");
    let expected = node.config()["prevResult"].take();
    node.project(&[("shop", Treatment::Held)]);
    assert_eq!(node.call("ADD").set("CNI_ARGS", args(hash)).run().result(), expected, "without an agent");
    node.call("ADD").set("CNI_ARGS", args(uuid)).run().failure(11);

    let (_agent, asked) = node.answering(Answer::Refused { message: "asked".into(), retry: false });
    assert_eq!(node.call("ADD").set("CNI_ARGS", args(hash)).run().result(), expected);
    node.call("CHECK").set("CNI_ARGS", args(hash)).run().nothing();
    assert!(asked.try_recv().is_err());
    for other in [uuid, &hash[1..], "0123456789abcdef0123456789abcdeg", ""] {
        node.call("ADD").set("CNI_ARGS", args(other)).run().failure(100);
    }
}

#[test]
fn a_refusal_is_told_with_the_agents_reason() {
    let node = Node::new();
    // Free or not: the agent is there, and its word counts.
    node.project(&[("shop", Treatment::Free)]);
    for (retry, code) in [(true, 11), (false, 100)] {
        let agent = node.answering(Answer::Refused { message: "no cgroup for the pod".into(), retry });
        let message = node.call("ADD").run().failure(code);
        assert_eq!(message, "pod shop/web-0: no cgroup for the pod");
        assert_eq!(node.call("CHECK").run().failure(code), message);
        agent.0.remove();
    }
}

#[test]
fn without_an_agent_only_a_free_namespace_passes() {
    let node = Node::new();
    node.project(&[("shop", Treatment::Free), ("bank", Treatment::Held)]);
    let outcome = node.call("ADD").run();
    assert_eq!(outcome.result(), node.config()["prevResult"]);
    assert!(outcome.stderr.contains("pod shop/web-0 passes") && outcome.stderr.lines().count() == 1, "{outcome:?}");

    let outcome = node.call("ADD").pod("bank").run();
    let message = outcome.failure(11);
    for part in [
        "pod bank/web-0",
        "agent is not running on this node",
        "\"bank\" has pods in the mesh",
        "kubectl -n underpass-system get pods -o wide",
        "tries again by itself",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(outcome.took >= Duration::from_millis(2900), "{outcome:?}");

    let message = node.call("ADD").pod("new").run().failure(11);
    assert!(message.contains("whether namespace \"new\" is in the mesh is not known"), "{message}");
}

#[test]
fn a_projection_that_cannot_be_read_frees_nobody() {
    let nodes: Vec<Node> = (0..5).map(|_| Node::new()).collect();
    // The first has none.
    fs::write(nodes[1].projection(), "garbage").unwrap();
    fs::write(nodes[2].projection(), r#"{"version":2,"namespaces":{"shop":"free"}}"#).unwrap();
    fs::write(nodes[3].projection(), r#"{"version":1,"namespaces":{"shop":"free""#).unwrap();
    fs::create_dir(nodes[4].projection()).unwrap();
    let running: Vec<_> = nodes.iter().map(|node| node.call("ADD").start()).collect();
    for running in running {
        let message = running.end().failure(11);
        assert!(message.contains("not known") && message.contains("enrolment.json cannot be read"), "{message}");
    }
}

#[test]
fn a_killed_agents_socket_is_no_agent() {
    let node = Node::new();
    node.project(&[("shop", Treatment::Free)]);
    drop(node.answering(Answer::Done { held: true }));
    assert!(node.socket().exists());
    let outcome = node.call("ADD").run();
    outcome.result();
    assert!(outcome.stderr.contains("refused"), "{outcome:?}");
    assert!(node.call("ADD").pod("bank").run().failure(11).contains("is not running"));
}

#[test]
fn an_agent_that_comes_in_time_gets_the_pod() {
    let node = Node::new();
    let mut running = node.call("ADD").start();
    thread::sleep(Duration::from_millis(500));
    assert!(running.is_running());
    let (_agent, asked) = node.answering(Answer::Done { held: true });
    let outcome = running.end();
    assert_eq!(outcome.result(), node.config()["prevResult"]);
    assert_eq!(asked.recv_timeout(PATIENCE).unwrap().request.command, Command::Add(attachment()));
}

#[test]
fn an_agent_that_dies_over_the_request_is_asked_again_when_it_is_back() {
    let node = Node::new();
    let times = AtomicUsize::new(0);
    let _agent = node.agent(move |stream| {
        // First without reading, then without answering, then in the middle of the answer.
        match times.fetch_add(1, Ordering::Relaxed) {
            0 => {}
            1 => drop(protocol::receive_request(stream).unwrap()),
            2 => {
                protocol::receive_request(stream).unwrap();
                std::io::Write::write_all(&mut &*stream, br#"{"answer":"do"#).unwrap();
            }
            _ => {
                protocol::receive_request(stream).unwrap();
                protocol::send_answer(stream, &Answer::Done { held: true }).unwrap();
            }
        }
    });
    assert_eq!(node.call("ADD").run().result(), node.config()["prevResult"]);
}

#[test]
fn an_agent_that_dies_over_every_request_is_given_up() {
    let node = Node::new();
    let _agent = node.agent(|stream| drop(protocol::receive_request(stream).unwrap()));
    let outcome = node.call("ADD").run();
    assert!(
        outcome.failure(11).contains("is not running on this node (the connection ended without answer)"),
        "{outcome:?}"
    );
    node.project(&[("shop", Treatment::Free)]);
    node.call("ADD").run().result();
}

#[test]
fn garbage_for_an_answer_holds_the_pod_also_in_a_free_namespace() {
    let node = Node::new();
    node.project(&[("shop", Treatment::Free)]);
    for garbage in [
        &b"garbage"[..],
        b"\xff\xfe\0",
        b"{}",
        br#"{"answer":"yes"}"#,
        br#"{"answer":"done","held":1}"#,
        &vec![b' '; 100_000].leak()[..],
    ] {
        let agent = node.agent(move |stream| {
            protocol::receive_request(stream).unwrap();
            // The plugin may have had enough.
            let _ = std::io::Write::write_all(&mut &*stream, garbage);
        });
        let outcome = node.call("ADD").run();
        let message = outcome.failure(11);
        assert!(
            message.contains("pod shop/web-0 is held back: the Underpass agent on this node does not answer"),
            "{message}"
        );
        assert!(outcome.took < Duration::from_secs(10), "{outcome:?}");
        agent.remove();
    }
}

#[test]
fn a_slow_agent_is_waited_for() {
    let node = Node::new();
    let _agent = node.agent(|stream| {
        protocol::receive_request(stream).unwrap();
        // Longer than is waited for an agent that is not there.
        thread::sleep(Duration::from_secs(4));
        protocol::send_answer(stream, &Answer::Done { held: true }).unwrap();
    });
    let outcome = node.call("ADD").run();
    outcome.result();
    assert!(outcome.took >= Duration::from_secs(4), "{outcome:?}");
}

#[test]
fn an_agent_that_hangs_is_not_waited_for_without_end() {
    let node = Node::new();
    node.project(&[("shop", Treatment::Free)]);
    let (end, ended) = mpsc::channel::<()>();
    let ended = Mutex::new(ended);
    let agent = node.agent(move |stream| {
        protocol::receive_request(stream).unwrap();
        let _ = ended.lock().unwrap().recv_timeout(PATIENCE * 2);
    });
    let (add, del) = (node.call("ADD").start(), node.call("DEL").start());
    let outcome = del.end();
    outcome.nothing();
    assert!(outcome.stderr.contains("DEL goes on without the agent"), "{outcome:?}");
    assert!(outcome.took >= Duration::from_millis(1900) && outcome.took < Duration::from_secs(15), "{outcome:?}");
    let outcome = add.end();
    assert!(outcome.failure(11).contains("does not answer: no answer within 20.0 s"), "{outcome:?}");
    assert!(outcome.took >= Duration::from_millis(19_900), "{outcome:?}");
    drop(end);
    drop(agent);
}

#[test]
fn a_socket_that_cannot_be_reached_otherwise_holds_the_pod() {
    let node = Node::new();
    node.project(&[("shop", Treatment::Free)]);
    let long = format!("/{}", "x".repeat(200));
    let below_a_file = node.projection().join("agent.sock");
    for socket in [long.into(), below_a_file] {
        let message =
            node.call("ADD").edit(|config| config["socket"] = socket.to_str().unwrap().into()).run().failure(11);
        assert!(message.contains("does not answer"), "{message}");
    }
    // Root may go anywhere.
    if !nix::unistd::geteuid().is_root() {
        let (_agent, _) = node.answering(Answer::Done { held: true });
        fs::set_permissions(node.socket(), fs::Permissions::from_mode(0o000)).unwrap();
        assert!(node.call("ADD").run().failure(11).contains("Permission denied"));
    }
}

#[test]
fn a_hundred_pods_at_once() {
    let node = Node::new();
    let (_agent, asked) = node.answering(Answer::Done { held: true });
    let running: Vec<_> =
        (0..100).map(|index| node.call("ADD").set("CNI_CONTAINERID", format!("pod{index}")).start()).collect();
    for running in running {
        assert_eq!(running.end().result(), node.config()["prevResult"]);
    }
    let mut containers: Vec<String> = (0..100)
        .map(|_| match asked.recv_timeout(PATIENCE).unwrap().request.command {
            Command::Add(attachment) => attachment.container,
            other => panic!("{other:?}"),
        })
        .collect();
    containers.sort();
    containers.dedup();
    assert_eq!(containers.len(), 100);
}

#[test]
fn numbers_and_order_of_the_previous_result_are_kept() {
    let node = Node::new();
    let (_agent, _asked) = node.answering(Answer::Done { held: true });
    let previous = r#"{"zebra":[1.50e3, 123456789012345678901234567890],"cniVersion":"1.0.0","ips":[],"a":null}"#;
    let mut config = node.config();
    config["cniVersion"] = "1.0.0".into();
    let mut fields = config.as_object().unwrap().clone();
    fields.remove("prevResult");
    let text = Value::Object(fields).to_string();
    let stdin = format!("{},\"prevResult\":{previous}}}", &text[..text.len() - 1]);
    let outcome = node.call("ADD").stdin(stdin).run();
    assert_eq!((outcome.stdout.trim_end(), outcome.success), (previous, true), "{outcome:?}");
}
