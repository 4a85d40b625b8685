//! Which pods have an identity: one rule for the certificate authority, which signs for nobody else, and for the agents,
//! which take nobody else into the mesh.
//!
//! An identity is a `ServiceAccount`, and the API server's admission vouches that a pod may use it. Nobody vouches for a
//! static pod: its kubelet made it up, and shows it to the API as a mirror pod. A kubelet may create a mirror pod in any
//! namespace (`NodeRestriction` only binds it to the kubelet's own node), so an identity for mirror pods would give a
//! compromised node an identity in every namespace.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

/// Annotation of a mirror pod. The API server lets nobody add, change or remove it later.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Annotation with the UID that the kubelet itself uses for a static pod.
const HASH: &str = "kubernetes.io/config.hash";
/// Annotation that says where a kubelet has a pod from.
const SOURCE: &str = "kubernetes.io/config.source";
/// Its value for pods that come from the API server; others are `file` and `http`.
const FROM_API: &str = "api";

/// Why a pod has no identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum NoIdentity {
    /// A kubelet has it from a file or an address of its own.
    #[error("static pods have no identity: no ServiceAccount vouches for them; run it as an ordinary pod")]
    Static,
    /// Admission gives every pod of the API server one.
    #[error(
        "a pod without serviceAccountName has no identity; the API server's admission plugin ServiceAccount sets it"
    )]
    NoAccount,
    /// The API server gives every object one.
    #[error("a pod without UID has no identity; the API server sets it")]
    NoUid,
}

/// The service account whose identity a pod has: `account` is the one that its specification names.
pub(crate) fn account<'a>(meta: &ObjectMeta, account: Option<&'a str>) -> Result<&'a str, NoIdentity> {
    if is_static(meta) {
        return Err(NoIdentity::Static);
    }
    if meta.uid.as_deref().is_none_or(str::is_empty) {
        return Err(NoIdentity::NoUid);
    }
    account.filter(|account| !account.is_empty()).ok_or(NoIdentity::NoAccount)
}

/// Does a kubelet run the pod by itself? A service account that a mirror pod names changes nothing: no admission has seen it.
fn is_static(meta: &ObjectMeta) -> bool {
    let annotations = meta.annotations.as_ref();
    let foreign = |source: &String| source != FROM_API;
    annotations.is_some_and(|a| a.contains_key(MIRROR) || a.get(SOURCE).is_some_and(foreign))
        || meta.owner_references.iter().flatten().any(|owner| owner.api_version == "v1" && owner.kind == "Node")
}

/// The UID that the kubelet and the container runtime use for a static pod, as its mirror pod tells it.
pub(crate) fn static_uid(meta: &ObjectMeta) -> Option<&str> {
    meta.annotations.as_ref()?.get(HASH).map(String::as_str).filter(|hash| !hash.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(meta: Value, named: Option<&str>) -> Result<String, NoIdentity> {
        account(&serde_json::from_value(meta).unwrap(), named).map(str::to_owned)
    }

    #[test]
    fn an_ordinary_pod_has_the_identity_of_its_service_account() {
        let meta = json!({ "uid": "u", "annotations": { SOURCE: "api" },
            "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "DaemonSet", "name": "d", "uid": "d" },
                { "apiVersion": "example.org/v1", "kind": "Node", "name": "not a node of Kubernetes", "uid": "n" }] });
        assert_eq!(of(meta, Some("web")), Ok("web".into()));
    }

    #[test]
    fn whom_nobody_vouches_for_has_none() {
        for named in [None, Some(""), Some("web")] {
            for mark in [
                json!({ "annotations": { MIRROR: "" } }),
                json!({ "annotations": { MIRROR: "h", HASH: "h", SOURCE: "file" } }),
                json!({ "annotations": { SOURCE: "http" } }),
                json!({ "annotations": { SOURCE: "" } }),
                json!({ "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": "n", "uid": "n" }] }),
            ] {
                let mut meta = mark.clone();
                meta["uid"] = json!("u");
                assert_eq!(of(meta, named), Err(NoIdentity::Static), "{mark} {named:?}");
            }
        }
        assert_eq!(of(json!({ "uid": "u" }), None), Err(NoIdentity::NoAccount));
        assert_eq!(of(json!({ "uid": "u" }), Some("")), Err(NoIdentity::NoAccount));
        assert_eq!(of(json!({}), Some("web")), Err(NoIdentity::NoUid));
        assert_eq!(of(json!({ "uid": "" }), Some("web")), Err(NoIdentity::NoUid));
    }
}
