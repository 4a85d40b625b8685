//! `policies`: the `spec` of Istio's `AuthorizationPolicy`, with `name`, `namespace` and `dryRun` beside it.
//!
//! Every field of that API for rules is here, also those that need HTTP: a policy can be pasted, and what it loses is
//! reported instead of refused.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_saphyr::Spanned;

/// A list as written. Absent and empty are told apart: an empty one is refused.
pub(in crate::sources::file) type Strings = Spanned<Vec<Spanned<String>>>;

/// Labels, with the positions of their values.
pub(in crate::sources::file) type Labels = BTreeMap<String, Spanned<String>>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::sources::file) struct Policy {
    pub(in crate::sources::file) name: Spanned<String>,
    pub(in crate::sources::file) namespace: Spanned<String>,
    #[serde(default)]
    pub(in crate::sources::file) dry_run: bool,
    #[serde(default)]
    pub(in crate::sources::file) selector: Selector,
    #[serde(default)]
    pub(in crate::sources::file) action: Action,
    pub(in crate::sources::file) provider: Option<Spanned<Provider>>,
    #[serde(default)]
    pub(in crate::sources::file) rules: Vec<Rule>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(in crate::sources::file) struct Selector {
    pub(in crate::sources::file) match_labels: Labels,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(in crate::sources::file) enum Action {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::sources::file) struct Provider {
    #[serde(rename = "name")]
    _name: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::sources::file) struct Rule {
    pub(in crate::sources::file) from: Option<Spanned<Vec<From>>>,
    pub(in crate::sources::file) to: Option<Spanned<Vec<To>>>,
    pub(in crate::sources::file) when: Option<Spanned<Vec<Condition>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::sources::file) struct From {
    pub(in crate::sources::file) source: Spanned<Source>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::sources::file) struct Source {
    pub(in crate::sources::file) principals: Option<Strings>,
    pub(in crate::sources::file) not_principals: Option<Strings>,
    pub(in crate::sources::file) namespaces: Option<Strings>,
    pub(in crate::sources::file) not_namespaces: Option<Strings>,
    pub(in crate::sources::file) service_accounts: Option<Strings>,
    pub(in crate::sources::file) not_service_accounts: Option<Strings>,
    pub(in crate::sources::file) ip_blocks: Option<Strings>,
    pub(in crate::sources::file) not_ip_blocks: Option<Strings>,
    pub(in crate::sources::file) remote_ip_blocks: Option<Strings>,
    pub(in crate::sources::file) not_remote_ip_blocks: Option<Strings>,
    pub(in crate::sources::file) request_principals: Option<Strings>,
    pub(in crate::sources::file) not_request_principals: Option<Strings>,
    pub(in crate::sources::file) trust_domains: Option<Strings>,
    pub(in crate::sources::file) not_trust_domains: Option<Strings>,
}

impl Source {
    /// Fields that cannot be known of a TCP connection, or are not supported, with their names.
    pub(in crate::sources::file) fn unsupported(&self) -> [(&'static str, &Option<Strings>); 6] {
        [
            ("remoteIpBlocks", &self.remote_ip_blocks),
            ("notRemoteIpBlocks", &self.not_remote_ip_blocks),
            ("requestPrincipals", &self.request_principals),
            ("notRequestPrincipals", &self.not_request_principals),
            ("trustDomains", &self.trust_domains),
            ("notTrustDomains", &self.not_trust_domains),
        ]
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::sources::file) struct To {
    pub(in crate::sources::file) operation: Spanned<Operation>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::sources::file) struct Operation {
    pub(in crate::sources::file) ports: Option<Strings>,
    pub(in crate::sources::file) not_ports: Option<Strings>,
    pub(in crate::sources::file) hosts: Option<Strings>,
    pub(in crate::sources::file) not_hosts: Option<Strings>,
    pub(in crate::sources::file) methods: Option<Strings>,
    pub(in crate::sources::file) not_methods: Option<Strings>,
    pub(in crate::sources::file) paths: Option<Strings>,
    pub(in crate::sources::file) not_paths: Option<Strings>,
}

impl Operation {
    /// Fields that need HTTP, with their names.
    pub(in crate::sources::file) fn unsupported(&self) -> [(&'static str, &Option<Strings>); 6] {
        [
            ("hosts", &self.hosts),
            ("notHosts", &self.not_hosts),
            ("methods", &self.methods),
            ("notMethods", &self.not_methods),
            ("paths", &self.paths),
            ("notPaths", &self.not_paths),
        ]
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::sources::file) struct Condition {
    pub(in crate::sources::file) key: Spanned<String>,
    pub(in crate::sources::file) values: Option<Strings>,
    pub(in crate::sources::file) not_values: Option<Strings>,
}
