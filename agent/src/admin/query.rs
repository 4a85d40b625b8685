//! Which connections are asked for.

use serde::{Deserialize, Serialize};

use super::api::DEFAULT_LIMIT;
use crate::relay::{Connection, ConnectionOrder, DataPath, Direction};

/// Parameters of `GET /v1/connections`; all may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionQuery {
    /// List at most this many, [`DEFAULT_LIMIT`] by default.
    pub limit: Option<usize>,
    /// Only of this workload: `NAMESPACE/NAME`, or `NAME` in any namespace, or `NAMESPACE/`.
    pub workload: Option<String>,
    /// Only with this identity on one of the two sides: a SPIFFE ID, or its end behind a slash (`web`, `ns/default/sa/web`).
    pub identity: Option<String>,
    /// Only these.
    pub direction: Option<Direction>,
    /// Only these.
    pub data_path: Option<DataPath>,
    /// Which come first, when there are more than the limit.
    #[serde(default)]
    pub sort: ConnectionOrder,
}

impl ConnectionQuery {
    /// The limit in force.
    pub fn limit(&self) -> usize {
        self.limit.unwrap_or(DEFAULT_LIMIT)
    }

    /// Is this connection asked for?
    pub fn selects(&self, connection: &Connection) -> bool {
        let what = &connection.what;
        let identities = [&what.source_identity, &what.destination_identity];
        self.direction.is_none_or(|d| d == what.direction)
            && self.data_path.is_none_or(|d| d == what.data_path)
            && self.workload.as_ref().is_none_or(|w| is_workload(w, &what.workload.namespace, &what.workload.name))
            && self
                .identity
                .as_ref()
                .is_none_or(|asked| identities.into_iter().flatten().any(|id| is_identity(asked, &id.to_string())))
    }
}

fn is_workload(asked: &str, namespace: &str, name: &str) -> bool {
    match asked.split_once('/') {
        Some((n, "")) => n == namespace,
        Some((n, rest)) => n == namespace && rest == name,
        None => asked == name,
    }
}

fn is_identity(asked: &str, id: &str) -> bool {
    id.strip_suffix(asked).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
}

#[cfg(test)]
mod tests {
    use super::{is_identity, is_workload};

    #[test]
    fn workloads_by_name_namespace_or_both() {
        for (asked, selected) in
            [("web", true), ("shop/web", true), ("shop/", true), ("we", false), ("shop", false), ("a/web", false)]
        {
            assert_eq!(is_workload(asked, "shop", "web"), selected, "{asked}");
        }
        assert!(!is_workload("", "shop", "web"));
    }

    #[test]
    fn identities_whole_or_by_their_end() {
        let id = "spiffe://cluster.local/ns/shop/sa/web";
        for (asked, selected) in [(id, true), ("web", true), ("ns/shop/sa/web", true), ("eb", false), ("sa/we", false)]
        {
            assert_eq!(is_identity(asked, id), selected, "{asked}");
        }
    }
}
