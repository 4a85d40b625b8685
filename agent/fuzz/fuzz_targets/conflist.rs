//! Other people's network configurations: an edit leaves everything but our entry as it was, and can be taken back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use underpass_cni::conflist::{ConflistError, Fields, TYPE, chain, from_single, unchain};

/// What is not ours.
fn others(text: &str) -> Value {
    let mut list: Value = serde_json::from_str(text).expect("what is edited is JSON");
    list["plugins"].as_array_mut().expect("and a list").retain(|plugin| plugin["type"] != TYPE);
    list
}

fn check(text: &str, fields: &Fields<'_>) {
    assert_eq!(chain(text, fields), Ok(None), "it is in its place");
    let without = unchain(text).expect("it is a list").expect("with our entry");
    assert_eq!(others(text), others(&without));
    assert_eq!(unchain(&without), Ok(None));
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // What is only cut and pasted may be nested deeper, or have larger numbers, than can be compared here.
    if serde_json::from_str::<Value>(text).is_err() {
        let _ = (chain(text, &Fields::default()), unchain(text), from_single(text, &Fields::default()));
        return;
    }
    let exempt = ["kube-system".to_owned()];
    let fields = Fields {
        socket: "/run/underpass/cni/agent.sock".into(),
        projection: "/run/underpass/cni/enrolment.json".into(),
        exempt_namespaces: (&exempt[..]).into(),
    };
    match chain(text, &fields) {
        Ok(Some(chained)) => {
            check(&chained, &fields);
            if unchain(text) == Ok(None) {
                assert_eq!(unchain(&chained).expect("it is a list").as_deref(), Some(text), "every byte comes back");
            }
        }
        Ok(None) => check(text, &fields),
        Err(ConflistError::Malformed(reason) | ConflistError::Version(reason)) => assert!(!reason.is_empty()),
        Err(ConflistError::NoNetwork(reason)) => assert!(!reason.is_empty()),
    }
    if let Ok(list) = from_single(text, &fields) {
        assert!(list.contains(text.trim()));
        check(&list, &fields);
    }
});
