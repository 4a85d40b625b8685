//! What a runtime says to the CNI plugin, on standard input and in the environment. The input is standard input; what
//! stands before a first line break is `CNI_ARGS`.
#![no_main]

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
};

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use underpass_cni::plugin::{Config, Subject, pod};

fuzz_target!(|bytes: &[u8]| {
    let (args, stdin) = match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (&[][..], bytes),
    };
    let variables = |name: &str| -> Option<OsString> {
        match name {
            "CNI_NETNS" => Some("/run/netns/a".into()),
            _ => Some(OsStr::from_bytes(args).to_owned()),
        }
    };
    if let Ok(subject) = Subject::read(&variables) {
        assert!(!subject.container.is_empty() && (1..=15).contains(&subject.interface.len()));
    }
    if let Ok(args) = std::str::from_utf8(args) {
        match pod(args) {
            // A pod must not pass for none.
            Ok(None) => assert!(!args.split(';').any(|pair| pair.starts_with("K8S_POD_NAME="))),
            Ok(Some(pod)) => assert!(!pod.namespace.is_empty() && !pod.name.is_empty()),
            Err(failure) => assert!(failure.message.starts_with("CNI_ARGS: ")),
        }
    }
    let version = Config::version_of(stdin);
    assert!(!version.is_empty());
    match Config::parse(stdin) {
        Ok(config) => {
            assert!(config.socket.is_absolute() && config.projection.is_absolute());
            let valid = config.valid().unwrap_or_default();
            assert!(valid.is_sorted(), "each once");
            if let Ok(previous) = config.previous() {
                let result = serde_json::to_string(&previous).expect("it was JSON before");
                // What is only handed on may be nested deeper, or have larger numbers, than can be read here.
                if serde_json::from_slice::<Value>(stdin).is_ok() {
                    let result: Value = serde_json::from_str(&result).expect("and is again");
                    assert_eq!(result["cniVersion"], version);
                }
            }
        }
        Err(failure) => {
            let error: Value = serde_json::from_str(&failure.to_json(&version)).expect("an answer is JSON");
            assert_eq!(error["msg"], *failure.message);
        }
    }
});
