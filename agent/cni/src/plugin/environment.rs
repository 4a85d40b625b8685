//! What a runtime says in environment variables.

use std::{ffi::OsString, path::PathBuf};

use super::failure::{Code, Failure};
use crate::protocol::PodName;

/// Longest name of a network interface, in bytes (`IFNAMSIZ` without the end).
const LONGEST_INTERFACE: usize = 15;

/// `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the specification's names
pub enum Verb {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

impl Verb {
    /// Reads `CNI_COMMAND`.
    ///
    /// # Errors
    /// Code 4 for what the specification does not know.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        Ok(match text {
            "ADD" => Self::Add,
            "CHECK" => Self::Check,
            "DEL" => Self::Del,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            other => {
                let reason = "is none of ADD, CHECK, DEL, GC, STATUS, VERSION";
                return Err(wrong("CNI_COMMAND", other, reason));
            }
        })
    }
}

/// Where the variables come from: the process's, or a test's.
pub trait Variables {
    /// A variable's value.
    fn get(&self, name: &str) -> Option<OsString>;

    /// A variable that has to be UTF-8; none is as good as an empty one.
    ///
    /// # Errors
    /// Code 4 when it is not UTF-8.
    fn text(&self, name: &'static str) -> Result<String, Failure> {
        self.get(name)
            .unwrap_or_default()
            .into_string()
            .map_err(|raw| wrong(name, &raw.to_string_lossy(), "is not UTF-8"))
    }
}

impl<F: Fn(&str) -> Option<OsString>> Variables for F {
    fn get(&self, name: &str) -> Option<OsString> {
        self(name)
    }
}

/// What `ADD` and `CHECK` are about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// `CNI_CONTAINERID`.
    pub container: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// From `CNI_ARGS`; `None` for what is no pod of Kubernetes.
    pub pod: Option<PodName>,
}

impl Subject {
    /// Reads the variables.
    ///
    /// # Errors
    /// Code 4, with the variable's name and value.
    pub fn read(variables: &impl Variables) -> Result<Self, Failure> {
        let container = container(variables)?;
        let interface = variables.text("CNI_IFNAME")?;
        let foreign = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if matches!(&*interface, "" | "." | "..") || interface.len() > LONGEST_INTERFACE || interface.contains(foreign)
        {
            return Err(wrong("CNI_IFNAME", &interface, "is no name of a network interface"));
        }
        let netns = variables.get("CNI_NETNS").unwrap_or_default();
        if netns.is_empty() {
            return Err(wrong("CNI_NETNS", "", "has to be the path of the pod's network namespace"));
        }
        let pod = pod(&variables.text("CNI_ARGS")?)?;
        Ok(Self { container, interface, netns: netns.into(), pod })
    }
}

/// Reads `CNI_CONTAINERID`.
///
/// # Errors
/// Code 4 when it is none.
pub fn container(variables: &impl Variables) -> Result<String, Failure> {
    let container = variables.text("CNI_CONTAINERID")?;
    let first = container.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if first && container.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte)) {
        return Ok(container);
    }
    Err(wrong("CNI_CONTAINERID", &container, "is no id: letters, digits, '_', '.', '-', the first a letter or digit"))
}

/// The pod in `CNI_ARGS`, which are `KEY=VALUE;KEY=VALUE` in any order.
///
/// # Errors
/// Code 4 for what cannot be read, or names only half a pod: a pod must not pass for none.
pub fn pod(args: &str) -> Result<Option<PodName>, Failure> {
    let (mut namespace, mut name, mut uid) = (None, None, None);
    for pair in args.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(wrong("CNI_ARGS", args, "is no list of KEY=VALUE;KEY=VALUE"));
        };
        let field = match key {
            "K8S_POD_NAMESPACE" => &mut namespace,
            "K8S_POD_NAME" => &mut name,
            "K8S_POD_UID" => &mut uid,
            _ => continue,
        };
        if field.replace(value).is_some_and(|before| before != value) {
            return Err(wrong("CNI_ARGS", args, &format!("has two different values of {key}")));
        }
    }
    let uid = uid.filter(|uid| !uid.is_empty()).map(str::to_owned);
    match (namespace, name) {
        (None, None) if uid.is_none() => Ok(None),
        (Some(namespace), Some(name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok(Some(PodName { namespace: namespace.into(), name: name.into(), uid }))
        }
        _ => Err(wrong("CNI_ARGS", args, "names a pod by half: K8S_POD_NAMESPACE and K8S_POD_NAME belong together")),
    }
}

/// Values are cut: they end up in an event of the pod.
fn wrong(variable: &str, value: &str, reason: &str) -> Failure {
    let value: String = value.chars().take(200).collect();
    Failure::new(Code::Environment, format!("{variable}: {value:?} {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(namespace: &str, name: &str, uid: Option<&str>) -> PodName {
        PodName { namespace: namespace.into(), name: name.into(), uid: uid.map(Into::into) }
    }

    #[test]
    fn pods_are_found_in_any_order() {
        let containerd = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=abc;\
                          K8S_POD_UID=6f3c0000-0000-4000-8000-000000000001";
        let uid = "6f3c0000-0000-4000-8000-000000000001";
        assert_eq!(pod(containerd).unwrap().unwrap(), named("shop", "web-0", Some(uid)));
        assert_eq!(pod("K8S_POD_NAME=b;K8S_POD_NAMESPACE=a").unwrap().unwrap(), named("a", "b", None));
        assert_eq!(pod("K8S_POD_NAME=b;;K8S_POD_NAMESPACE=a;K8S_POD_UID=;").unwrap().unwrap(), named("a", "b", None));
        assert_eq!(pod("K8S_POD_NAME=b;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b").unwrap().unwrap(), named("a", "b", None));
        assert_eq!(pod("X=a=b;K8S_POD_NAME=b;K8S_POD_NAMESPACE=a").unwrap().unwrap(), named("a", "b", None));
    }

    #[test]
    fn without_one_it_is_no_pod() {
        for args in ["", ";", "IgnoreUnknown=1", "FOO=BAR;ABC=123"] {
            assert_eq!(pod(args).unwrap(), None, "{args}");
        }
    }

    #[test]
    fn half_a_pod_is_not_taken_for_none() {
        for args in [
            "K8S_POD_NAME=b",
            "K8S_POD_NAMESPACE=a",
            "K8S_POD_UID=c",
            "K8S_POD_NAMESPACE=;K8S_POD_NAME=b",
            "K8S_POD_NAMESPACE=;K8S_POD_NAME=",
            "K8S_POD_NAMESPACE",
            "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_NAMESPACE=free",
            "garbage",
        ] {
            let failure = pod(args).unwrap_err();
            assert_eq!(failure.code, Code::Environment, "{args}");
            assert!(failure.message.contains("CNI_ARGS") && failure.message.contains(args), "{failure}");
        }
    }

    #[test]
    fn names_are_checked_as_the_specification_says() {
        let subject = |id: &str, interface: &str| {
            let of = |name: &str| -> Option<OsString> {
                match name {
                    "CNI_CONTAINERID" => Some(id.into()),
                    "CNI_IFNAME" => Some(interface.into()),
                    "CNI_NETNS" => Some("/run/netns/a".into()),
                    _ => None,
                }
            };
            Subject::read(&of)
        };
        subject("0a_.-Z", "eth0").unwrap();
        subject("a", "fifteen-letters").unwrap();
        for id in ["", "-a", ".", "a/b", "a b", "ä", "a\n"] {
            assert!(subject(id, "eth0").unwrap_err().message.starts_with("CNI_CONTAINERID: "), "{id}");
        }
        for interface in ["", ".", "..", "sixteen--letters", "a/b", "a:b", "a b", "a\n"] {
            assert!(subject("a", interface).unwrap_err().message.starts_with("CNI_IFNAME: "), "{interface}");
        }
    }
}
