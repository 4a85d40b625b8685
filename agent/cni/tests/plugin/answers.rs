//! The other commands, and what is wrong with a call.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use serde_json::{Value, json};
use underpass_cni::{
    projection::Treatment,
    protocol::{Answer, Command, PodName, Removal},
};

use super::world::{Node, PATIENCE, namespace};

#[test]
fn versions_are_told_whatever_is_asked() {
    let node = Node::new();
    let supported = json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    for (stdin, version) in [
        (&b""[..], "1.1.0"),
        (b"garbage", "1.1.0"),
        (b"\xff", "1.1.0"),
        (br#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (br#"{"cniVersion":"9.9.9"}"#, "1.1.0"),
    ] {
        let result = node.call("VERSION").stdin(stdin).run().result();
        assert_eq!(result, json!({"cniVersion": version, "supportedVersions": supported}));
    }
}

#[test]
fn somebody_who_starts_it_by_hand_is_told_what_it_is() {
    let outcome = Node::new().call("ADD").unset("CNI_COMMAND").run();
    assert!(outcome.failure(4).starts_with("CNI_COMMAND: \"\""));
    assert!(
        outcome.stderr.contains("CNI plugin of Underpass") && outcome.stderr.contains("0.3.0, 0.3.1"),
        "{outcome:?}"
    );
}

#[test]
fn variables_that_cannot_be_used_are_named() {
    let node = Node::new();
    for command in ["ADD", "CHECK"] {
        for (variable, value) in [
            ("CNI_CONTAINERID", "../x"),
            ("CNI_CONTAINERID", ""),
            ("CNI_IFNAME", "a/b"),
            ("CNI_NETNS", ""),
            ("CNI_NETNS", "/nonexistent/netns"),
            ("CNI_ARGS", "K8S_POD_NAME=a"),
            ("CNI_ARGS", "nonsense"),
        ] {
            let message = node.call(command).set(variable, value).run().failure(4);
            assert!(message.starts_with(&format!("{variable}: ")) && message.contains(value), "{message}");
        }
        for variable in ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"] {
            assert!(node.call(command).unset(variable).run().failure(4).starts_with(variable));
        }
        let garbage = OsStr::from_bytes(b"K8S_POD_NAME=\xff");
        assert!(node.call(command).set("CNI_ARGS", garbage).run().failure(4).contains("is not UTF-8"));
    }
    assert!(node.call("add").run().failure(4).contains("CNI_COMMAND: \"add\" is none of ADD"));
}

#[test]
fn configurations_that_cannot_be_used_are_refused() {
    let node = Node::new();
    for command in ["ADD", "CHECK", "GC", "STATUS"] {
        for stdin in ["", "garbage", "[]", r#"{"cniVersion":1}"#, r#"{"cniVersion":"1.1.0","exemptNamespaces":"x"}"#] {
            let message = node.call(command).stdin(stdin).run().failure(6);
            assert!(message.contains("standard input is no network configuration"), "{message}");
        }
        let large = format!("{}{}", node.config(), " ".repeat(2 << 20));
        assert!(node.call(command).stdin(large).run().failure(6).contains("more than 1048576 bytes"));
        for version in ["", "0.2.0", "1.2.0", "x"] {
            let message = node.call(command).edit(|config| config["cniVersion"] = version.into()).run().failure(1);
            assert!(message.contains(&format!("{version:?} is none of 0.3.0")), "{message}");
        }
        for field in ["socket", "projection"] {
            let message = node.call(command).edit(|config| config[field] = Value::Null).run().failure(7);
            assert!(message.starts_with(&format!("{field} is missing")), "{message}");
            let message = node.call(command).edit(|config| config[field] = "x".into()).run().failure(7);
            assert_eq!(message, format!("{field}: \"x\" has to be an absolute path"));
        }
    }
    for command in ["ADD", "CHECK"] {
        let message = node.call(command).edit(|config| config["prevResult"] = Value::Null).run().failure(7);
        assert!(message.contains("must be chained behind another plugin"), "{message}");
        for previous in [json!([]), json!({"ips": [{"address": "x"}]})] {
            let message = node.call(command).edit(|config| config["prevResult"] = previous).run().failure(7);
            assert!(message.starts_with("prevResult: "), "{message}");
        }
    }
    let error: Value = serde_json::from_str(&node.call("ADD").stdin(r#"{"cniVersion":"0.4.0"}"#).run().stdout).unwrap();
    assert_eq!(error["cniVersion"], "0.4.0");
}

#[test]
fn commands_exist_since_their_version() {
    let node = Node::new();
    let (_agent, _asked) = node.answering(Answer::Done { held: true });
    for (command, before) in [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")] {
        let message = node.call(command).edit(|config| config["cniVersion"] = before.into()).run().failure(1);
        assert!(message.contains("does not have this command"), "{message}");
    }
    node.call("CHECK").edit(|config| config["cniVersion"] = "0.4.0".into()).run().nothing();
}

#[test]
fn check_asks_the_agent() {
    let node = Node::new();
    let (agent, asked) = node.answering(Answer::Done { held: true });
    node.call("CHECK").run().nothing();
    let asked = asked.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(asked.request.command, Command::Check(attachment) if attachment.container == "c0ffee"));
    assert_eq!(asked.namespace, Some(namespace()));
    agent.remove();
    assert!(node.call("CHECK").run().failure(11).contains("is not known"));
    node.project(&[("shop", Treatment::Free), ("bank", Treatment::Held)]);
    node.call("CHECK").run().nothing();
    assert!(node.call("CHECK").pod("bank").run().failure(11).contains("has pods in the mesh"));
}

#[test]
fn del_tells_the_agent_and_succeeds_with_whatever_it_is_given() {
    let node = Node::new();
    let (agent, asked) = node.answering(Answer::Done { held: false });
    let removal = |pod| Command::Del(Removal { container: "c0ffee".into(), pod });
    let pod = PodName { namespace: "shop".into(), name: "web-0".into(), uid: Some("6f3c".into()) };
    // As it is repeated, without a network namespace and a result.
    for _ in 0..2 {
        node.call("DEL").set("CNI_NETNS", "").edit(|config| drop(config["prevResult"].take())).run().nothing();
        assert_eq!(asked.recv_timeout(PATIENCE).unwrap().request.command, removal(Some(pod.clone())));
    }
    for args in ["", "garbage", "K8S_POD_NAME=a", ";=;=="] {
        node.call("DEL").set("CNI_ARGS", args).unset("CNI_NETNS").run().nothing();
        let asked = asked.recv_timeout(PATIENCE).unwrap();
        assert_eq!(asked.request.command, removal(None));
        assert_eq!(asked.namespace, None);
    }
    for stdin in ["", "garbage", "{}", r#"{"cniVersion":"9.0.0"}"#] {
        let outcome = node.call("DEL").stdin(stdin).run();
        outcome.nothing();
        assert!(outcome.stderr.contains("DEL goes on without the agent"), "{outcome:?}");
    }
    node.call("DEL").set("CNI_CONTAINERID", "").run().nothing();
    node.call("DEL").edit(|config| config["prevResult"] = json!("garbage")).run().nothing();
    agent.remove();
    node.call("DEL").run().nothing();
    let (_agent, _) = node.answering(Answer::Refused { message: "unknown pod".into(), retry: false });
    let outcome = node.call("DEL").run();
    outcome.nothing();
    assert!(outcome.stderr.contains("unknown pod"), "{outcome:?}");
}

#[test]
fn gc_tells_the_agent_who_is_left() {
    let node = Node::new();
    let (agent, asked) = node.answering(Answer::Done { held: false });
    let gc = |valid: Value| {
        let mut call = node.call("GC");
        for variable in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"] {
            call.unset(variable);
        }
        call.edit(|config| config["cni.dev/valid-attachments"] = valid);
        call
    };
    let valid = json!([
        {"containerID": "b", "ifname": "eth0"},
        {"containerID": "a", "ifname": "eth0"},
        {"containerID": "b", "ifname": "net1"},
    ]);
    gc(valid).run().nothing();
    let expected = Command::Gc { valid: vec!["a".into(), "b".into()] };
    assert_eq!(asked.recv_timeout(PATIENCE).unwrap().request.command, expected);
    gc(json!([])).run().nothing();
    assert_eq!(asked.recv_timeout(PATIENCE).unwrap().request.command, Command::Gc { valid: Vec::new() });
    // Who does not say what is left does not mean that nothing is.
    let outcome = gc(Value::Null).run();
    outcome.nothing();
    assert!(outcome.stderr.contains("GC collects nothing"), "{outcome:?}");
    assert!(asked.try_recv().is_err());
    assert!(gc(json!("x")).run().failure(6).contains("no network configuration"));
    agent.remove();
    let outcome = gc(json!([])).run();
    outcome.nothing();
    assert!(outcome.stderr.contains("agent is not running"), "{outcome:?}");
    let many: Vec<Value> =
        (0..2000).map(|index| json!({"containerID": format!("{index:064}"), "ifname": "a"})).collect();
    let (_agent, asked) = node.answering(Answer::Done { held: false });
    // The agent sees a connection without a request; the answer is for somebody who has gone.
    let outcome = gc(many.into()).run();
    outcome.nothing();
    assert!(outcome.stderr.contains("at most 65536 can be sent"), "{outcome:?}");
    assert!(asked.try_recv().is_err());
}

#[test]
fn status_says_whether_any_pod_can_be_added() {
    let node = Node::new();
    let message = node.call("STATUS").run().failure(50);
    assert!(message.contains("no pod can be added") && message.contains("agent is not running"), "{message}");
    std::fs::write(node.projection(), "garbage").unwrap();
    assert!(node.call("STATUS").run().failure(50).contains("not a projection"));
    node.project(&[]);
    let outcome = node.call("STATUS").run();
    outcome.nothing();
    assert!(outcome.stderr.contains("only pods outside of the mesh"), "{outcome:?}");
    let (agent, asked) = node.answering(Answer::Done { held: false });
    let outcome = node.call("STATUS").run();
    outcome.nothing();
    assert_eq!(outcome.stderr, "");
    assert_eq!(asked.recv_timeout(PATIENCE).unwrap().request.command, Command::Status);
    agent.remove();
    let (_agent, _) = node.answering(Answer::Refused { message: "BPF programs are not loaded".into(), retry: true });
    assert_eq!(node.call("STATUS").run().failure(50), "BPF programs are not loaded");
}
