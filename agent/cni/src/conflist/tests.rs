//! Lists as CNIs write them, and any others.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// As Calico writes it.
const CALICO: &str = r#"{
  "name": "k8s-pod-network",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "calico",
      "log_level": "info",
      "mtu": 0,
      "nodename_file_optional": false,
      "ipam": { "type": "calico-ipam", "assign_ipv4" : "true"},
      "policy": {
          "type": "k8s"
      }
    },
    {
      "type": "portmap",
      "snat": true,
      "capabilities": {"portMappings": true}
    },
    {
      "type": "bandwidth",
      "capabilities": {"bandwidth": true}
    }
  ]
}
"#;

/// As Cilium writes it.
const CILIUM: &str = "{\n  \"cniVersion\": \"0.3.1\",\n  \"name\": \"cilium\",\n  \"plugins\": [\n    {\n       \"type\": \"cilium-cni\",\n       \"enable-debug\": false,\n       \"log-file\": \"/var/run/cilium/cilium-cni.log\"\n    }\n  ]\n}";

const OURS: &str = r#"{"type":"underpass-cni","socket":"/run/underpass/cni/agent.sock","projection":"/run/underpass/cni/enrolment.json","exemptNamespaces":["kube-system"]}"#;

fn exempt() -> Vec<String> {
    vec!["kube-system".into()]
}

fn fields(exempt: &[String]) -> Fields<'_> {
    Fields {
        socket: "/run/underpass/cni/agent.sock".into(),
        projection: "/run/underpass/cni/enrolment.json".into(),
        exempt_namespaces: exempt.into(),
    }
}

fn chained(text: &str) -> String {
    chain(text, &fields(&exempt())).unwrap().expect("it was not there")
}

#[test]
fn the_entry_comes_last_and_nothing_else_changes() {
    let expected =
        CALICO.replace("{\"bandwidth\": true}\n    }\n", &format!("{{\"bandwidth\": true}}\n    }},\n    {OURS}\n"));
    assert_ne!(expected, CALICO);
    assert_eq!(chained(CALICO), expected);
    assert_eq!(chained(CILIUM), CILIUM.replace("cni.log\"\n    }", &format!("cni.log\"\n    }},\n    {OURS}")));
    let line = r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"bridge"},{"type":"portmap"}],"zebra":1.0e2}"#;
    assert_eq!(chained(line), line.replace(r#"map"}"#, &format!(r#"map"}},{OURS}"#)));
}

#[test]
fn taking_it_out_gives_back_the_file() {
    for text in [CALICO, CILIUM] {
        assert_eq!(unchain(&chained(text)).unwrap().as_deref(), Some(text));
        assert_eq!(unchain(text).unwrap(), None);
    }
}

#[test]
fn an_entry_that_is_there_stays_and_one_that_differs_is_replaced_where_it_is() {
    let text = chained(CALICO);
    assert_eq!(chain(&text, &fields(&exempt())).unwrap(), None);
    // However somebody has indented it.
    let spaced = text.replace(r#""type":"underpass-cni","#, "\n\"type\" :  \"underpass-cni\" , ");
    assert_ne!(spaced, text);
    assert_eq!(chain(&spaced, &fields(&exempt())).unwrap(), None);
    let other = chain(&text, &fields(&[])).unwrap().unwrap();
    assert_eq!(other, text.replace(r#"["kube-system"]"#, "[]"));
    assert_eq!(unchain(&other).unwrap().as_deref(), Some(CALICO));
}

#[test]
fn it_is_there_once_and_behind_plugins_that_came_later() {
    let two = chained(CALICO).replace(OURS, &format!("{OURS},\n    {{\"type\": \"istio-cni\"}},\n    {OURS}"));
    let once = chain(&two, &fields(&exempt())).unwrap().unwrap();
    assert_eq!(once.matches(TYPE).count(), 1);
    assert_eq!(chain(&once, &fields(&exempt())).unwrap(), None);
    let without = unchain(&once).unwrap().unwrap();
    assert_eq!(without, CALICO.replace("true}\n    }\n  ]", "true}\n    },\n    {\"type\": \"istio-cni\"}\n  ]"));
    let first = CILIUM.replace("[\n    {\n", &format!("[\n    {OURS},\n    {{\n"));
    assert_eq!(unchain(&first).unwrap().as_deref(), Some(CILIUM));
    let moved = chain(&first, &fields(&exempt())).unwrap().unwrap();
    assert_eq!(moved, chained(CILIUM));
}

#[test]
fn a_list_without_a_network_is_nothing_to_chain_to() {
    for text in [
        r#"{"name":"a","cniVersion":"1.0.0"}"#.to_owned(),
        r#"{"name":"a","cniVersion":"1.0.0","plugins":null}"#.to_owned(),
        r#"{"name":"a","cniVersion":"1.0.0","plugins":[]}"#.to_owned(),
        format!(r#"{{"name":"a","cniVersion":"1.0.0","plugins":[{OURS}]}}"#),
    ] {
        let error = chain(&text, &fields(&[])).unwrap_err();
        assert!(matches!(error, ConflistError::NoNetwork(_)), "{text}: {error}");
        assert!(error.to_string().contains("plugins"), "{error}");
    }
}

#[test]
fn what_is_no_list_is_refused_with_the_place() {
    for (text, says) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("[1]", "invalid type"),
        ("{\"name\":\"a\",\n\"cniVersion\":\"1.0.0\",\n\"plugins\":[", "EOF while parsing a list at line 3"),
        (r#"{"cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#, "field \"name\" is missing"),
        (r#"{"name":"a","cniVersion":1,"plugins":[]}"#, "expected a string"),
        (
            r#"{"name":"a","cniVersion":"1.0.0","plugins":{}}"#,
            "field \"plugins\": invalid type: map, expected a sequence",
        ),
        (
            r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"b"},{}]}"#,
            "field \"plugins[1]\": missing field `type`",
        ),
        (r#"{"name":"a","cniVersion":"1.0.0","plugins":[1]}"#, "field \"plugins[0]\": invalid type"),
        (r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"b"}],"plugins":[]}"#, "duplicate field `plugins`"),
    ] {
        let error = chain(text, &fields(&[])).unwrap_err();
        assert!(matches!(error, ConflistError::Malformed(_)), "{text}: {error}");
        assert!(error.to_string().contains(says), "{text}: {error}");
    }
}

#[test]
fn only_versions_with_chains_are_taken() {
    let list = |versions: &str| format!(r#"{{"name":"a",{versions}"plugins":[{{"type":"bridge"}}]}}"#);
    for good in [
        r#""cniVersion":"0.3.0","#,
        r#""cniVersion":"1.1.0","#,
        r#""cniVersion":"0.2.0","cniVersions":["0.4.0","0.1.0"],"#,
        r#""cniVersions":["1.0.0"],"#,
    ] {
        assert!(chain(&list(good), &fields(&[])).unwrap().is_some(), "{good}");
    }
    for (bad, says) in [
        ("", "\"cniVersion\" is missing"),
        (r#""cniVersion":"","#, "\"cniVersion\" is missing"),
        (r#""cniVersion":"0.2.0","#, "0.2.0 is not supported"),
        (r#""cniVersion":"2.0.0","#, "2.0.0 is not supported"),
        (r#""cniVersion":"1.0.0","cniVersions":["1.0.0","1.2.0"],"#, "1.2.0 is not supported"),
        (r#""cniVersion":"1.0","#, "\"1.0\" is no version"),
        (r#""cniVersion":"1.0.0-rc1","#, "is no version"),
        (r#""cniVersion":"+1.0.0","#, "is no version"),
    ] {
        let error = chain(&list(bad), &fields(&[])).unwrap_err();
        assert!(matches!(error, ConflistError::Version(_)), "{bad}: {error}");
        assert!(error.to_string().contains(says), "{bad}: {error}");
    }
}

#[test]
fn one_plugin_becomes_a_list_with_the_same_name_and_version() {
    let single = "{ \"cniVersion\":\"0.4.0\", \"name\":\"my \\\"net\\\"\", \"type\":\"bridge\", \"mtu\": 1.50e3 }\n";
    let list = from_single(single, &fields(&exempt())).unwrap();
    let value: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(value["name"], "my \"net\"");
    assert_eq!(value["cniVersion"], "0.4.0");
    assert_eq!(value["plugins"][0], serde_json::from_str::<Value>(single).unwrap());
    assert!(list.contains(single.trim()));
    assert_eq!(chain(&list, &fields(&exempt())).unwrap(), None, "it is a list with our entry in its place");
    for (bad, says) in [
        (r#"{"cniVersion":"0.4.0","name":"a","plugins":[{"type":"b"}]}"#, "*.conflist"),
        (r#"{"cniVersion":"0.4.0","type":"bridge"}"#, "\"name\" is missing"),
        (r#"{"name":"a","type":"bridge"}"#, "\"cniVersion\" is missing"),
        (r#"{"cniVersion":"0.4.0","name":"a","type":"underpass-cni"}"#, "nothing to chain to"),
        ("nonsense", "not a network configuration"),
    ] {
        let error = from_single(bad, &fields(&[])).unwrap_err().to_string();
        assert!(error.contains(says), "{bad}: {error}");
    }
}

/// Any JSON, with numbers and strings that a careless writer would change.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
        Just(json!("[]{},:\"\\")),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z\"\\\\\\[\\]]{1,5}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// A list in a random layout, with as many of our entries as `ours` has places for.
fn any_list(ours: bool) -> impl Strategy<Value = String> {
    let plugin = (any_json(), "[a-z]{1,6}", prop::bool::weighted(if ours { 0.3 } else { 0.0 })).prop_map(
        |(other, kind, ours)| {
            if ours { OURS.to_owned() } else { json!({"other": other, "type": kind, "zebra": 1}).to_string() }
        },
    );
    let space = "[ \\t\\r\\n]{0,3}";
    let spaced = (space, plugin, space).prop_map(|(before, plugin, after)| format!("{before}{plugin}{after}"));
    (any_json(), prop::collection::vec(spaced, 1..5), any::<bool>(), space).prop_map(|(other, plugins, last, space)| {
        let plugins = format!("\"plugins\":{space}[{}]", plugins.join(","));
        let rest = format!("\"name\":\"net\",{space}\"cniVersion\": \"1.0.0\",\"zebra\":{other}");
        if last { format!("{space}{{{rest},{plugins}}}{space}") } else { format!("{{{plugins}{space},{rest}}}") }
    })
}

/// The list without our entries.
fn others(text: &str) -> Value {
    let mut value: Value = serde_json::from_str(text).unwrap();
    value["plugins"].as_array_mut().unwrap().retain(|plugin| plugin["type"] != TYPE);
    value
}

proptest! {
    #[test]
    fn putting_in_and_taking_out_gives_back_every_byte(text in any_list(false)) {
        let chained = chained(&text);
        prop_assert_eq!(unchain(&chained).unwrap(), Some(text));
    }

    #[test]
    fn once_is_as_good_as_twice(text in any_list(true)) {
        let exempt = exempt();
        let once = match chain(&text, &fields(&exempt)) {
            Ok(Some(once)) => once,
            Ok(None) => text.clone(),
            Err(ConflistError::NoNetwork(_)) => return Ok(()),
            Err(error) => panic!("{text}: {error}"),
        };
        prop_assert_eq!(chain(&once, &fields(&exempt)).unwrap(), None);
        prop_assert_eq!(others(&once), others(&text));
        let value: Value = serde_json::from_str(&once).unwrap();
        let plugins = value["plugins"].as_array().unwrap();
        prop_assert_eq!(plugins.iter().filter(|plugin| plugin["type"] == TYPE).count(), 1);
        prop_assert_eq!(plugins.last().unwrap(), &serde_json::from_str::<Value>(OURS).unwrap());
    }

    #[test]
    fn taking_out_leaves_the_others(text in any_list(true)) {
        let without = unchain(&text).unwrap().unwrap_or_else(|| text.clone());
        prop_assert_eq!(serde_json::from_str::<Value>(&without).unwrap(), others(&text));
        prop_assert_eq!(unchain(&without).unwrap(), None);
    }

    #[test]
    fn a_single_plugin_stays_whole(other in any_json()) {
        let single = json!({"name": "net", "cniVersion": "0.4.0", "type": "bridge", "other": other}).to_string();
        let list = from_single(&single, &fields(&[])).unwrap();
        let value: Value = serde_json::from_str(&list).unwrap();
        prop_assert_eq!(&value["plugins"][0], &serde_json::from_str::<Value>(&single).unwrap());
        prop_assert_eq!(chain(&list, &fields(&[])).unwrap(), None);
    }
}
