//! Authorization policies as data, in the shape of Istio's `AuthorizationPolicy`. What they mean is in
//! [`crate::policy`].
//!
//! Names follow Istio's API, so that a policy reads the same here, in a file and in a cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{ModeSource, SpiffeId};

/// `namespace/name` of a policy: unique in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What a matching policy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// Connections that match are allowed, and others to the same workloads are not.
    Allow,
    /// Connections that match are denied, whatever allows them.
    Deny,
    /// Connections that match are recorded by an audit plug-in. Changes no verdict.
    Audit,
    /// Connections that match are put before an external authorizer. There is none here: such a policy is
    /// [`PolicyStatus::Invalid`].
    Custom,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Action::Allow => "ALLOW",
            Action::Deny => "DENY",
            Action::Audit => "AUDIT",
            Action::Custom => "CUSTOM",
        })
    }
}

/// Among which workloads a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All of the mesh: the policy is in the root namespace.
    Mesh,
    /// Those of the policy's own namespace.
    Namespace,
    /// Those that name the policy, see [`WorkloadPolicy::policies`]: the control plane has evaluated the selector.
    Named,
}

/// Labels of a workload, or those a policy asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Labels(pub BTreeMap<Arc<str>, Arc<str>>);

impl Labels {
    /// Does a workload with these labels have all that `selector` asks for? An empty selector asks for nothing.
    pub fn satisfy(&self, selector: &Labels) -> bool {
        selector.0.iter().all(|(key, value)| self.0.get(key) == Some(value))
    }
}

/// Values that a field wants, and values that it does not. Without any, everything fits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Values<T> {
    /// One of these must match, unless the list is empty.
    pub any_of: Vec<T>,
    /// None of these may match.
    pub none_of: Vec<T>,
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self { any_of: Vec::new(), none_of: Vec::new() }
    }
}

impl<T> Values<T> {
    /// Does nothing constrain the field?
    pub fn is_unset(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }

    /// With `matches` telling which value fits the connection.
    pub fn hold(&self, matches: impl Fn(&T) -> bool) -> bool {
        (self.any_of.is_empty() || self.any_of.iter().any(&matches)) && !self.none_of.iter().any(&matches)
    }
}

/// A string of a policy: `abc`, `abc*`, `*abc` or `*`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StringMatch {
    /// The whole value.
    Exact(Arc<str>),
    /// How it begins.
    Prefix(Arc<str>),
    /// How it ends.
    Suffix(Arc<str>),
    /// There is one.
    Present,
}

impl StringMatch {
    /// Reads Istio's notation. Only one `*` counts, the first of the string before the last; any other is an ordinary
    /// character.
    pub fn parse(text: &str) -> Self {
        if text == "*" {
            Self::Present
        } else if let Some(suffix) = text.strip_prefix('*') {
            Self::Suffix(suffix.into())
        } else if let Some(prefix) = text.strip_suffix('*') {
            Self::Prefix(prefix.into())
        } else {
            Self::Exact(text.into())
        }
    }

    /// Does it match `value`? Nothing matches an empty one: that is how an absent value looks.
    pub fn matches(&self, value: &str) -> bool {
        !value.is_empty()
            && match self {
                Self::Exact(text) => value == &**text,
                Self::Prefix(text) => value.starts_with(&**text),
                Self::Suffix(text) => value.ends_with(&**text),
                Self::Present => true,
            }
    }
}

/// A Kubernetes service account of any trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl ServiceAccount {
    /// Is it the one of `identity`?
    pub fn matches(&self, identity: &SpiffeId) -> bool {
        *self.namespace == *identity.namespace() && *self.name == *identity.service_account()
    }
}

/// Who connects. All fields must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Source {
    /// Identity without `spiffe://`, e.g. `cluster.local/ns/default/sa/web`.
    pub principals: Values<StringMatch>,
    /// Namespace of the identity.
    pub namespaces: Values<StringMatch>,
    /// Service account of the identity.
    pub service_accounts: Values<ServiceAccount>,
    /// Address of the peer. Networks are truncated to their length; IPv4 ones are written as IPv4.
    pub ip_blocks: Values<IpNet>,
}

/// What is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Operation {
    /// Port that the application listens on.
    pub ports: Values<u16>,
}

/// One more thing that must hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Condition {
    /// `source.ip`.
    SourceIp(Values<IpNet>),
    /// `source.namespace`.
    SourceNamespace(Values<StringMatch>),
    /// `source.principal`.
    SourcePrincipal(Values<StringMatch>),
    /// `source.serviceAccount`.
    SourceServiceAccount(Values<ServiceAccount>),
    /// `destination.ip`.
    DestinationIp(Values<IpNet>),
    /// `destination.port`.
    DestinationPort(Values<u16>),
}

impl Condition {
    /// Its name in Istio's API.
    pub fn key(&self) -> &'static str {
        match self {
            Condition::SourceIp(_) => "source.ip",
            Condition::SourceNamespace(_) => "source.namespace",
            Condition::SourcePrincipal(_) => "source.principal",
            Condition::SourceServiceAccount(_) => "source.serviceAccount",
            Condition::DestinationIp(_) => "destination.ip",
            Condition::DestinationPort(_) => "destination.port",
        }
    }
}

/// One of the source matches, one of the operations, and all of the conditions. An empty list matches always.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    /// Sources.
    pub from: Vec<Source>,
    /// Operations.
    pub to: Vec<Operation>,
    /// Conditions.
    pub when: Vec<Condition>,
    /// Fields that need HTTP, or anything else that is not known of a TCP connection. A rule with such fields never
    /// matches in ALLOW; in DENY it matches as if they were not there. Either way less is let in than was meant.
    pub unsupported: Vec<Arc<str>>,
}

/// An authorization policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its key.
    pub key: PolicyKey,
    /// Among which workloads it selects.
    pub scope: Scope,
    /// Labels that the selected workloads have.
    pub selector: Labels,
    /// What it does.
    pub action: Action,
    /// It only reports.
    pub dry_run: bool,
    /// It matches when one of these does.
    pub rules: Vec<Rule>,
    /// Why it cannot be evaluated, and what to do. Its workloads then refuse every connection.
    pub invalid: Option<String>,
}

/// Is a policy enforced as written?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum PolicyStatus {
    /// As written.
    Active,
    /// Enforced without some of its fields, which lets in less than was meant.
    Partial {
        /// The fields.
        ignored: Vec<String>,
    },
    /// It cannot be evaluated, so every connection to its workloads is refused.
    Invalid {
        /// Why, and what to do.
        reason: String,
    },
}

impl Policy {
    /// Is it enforced as written?
    pub fn status(&self) -> PolicyStatus {
        if let Some(reason) = &self.invalid {
            return PolicyStatus::Invalid { reason: reason.clone() };
        }
        if self.action == Action::Custom {
            let reason = "action CUSTOM asks an external authorizer, which does not exist here; use ALLOW or DENY";
            return PolicyStatus::Invalid { reason: reason.to_owned() };
        }
        let mut ignored: Vec<String> = Vec::new();
        if self.action == Action::Audit {
            ignored.push("action AUDIT".to_owned());
        }
        let fields: BTreeSet<_> = self.rules.iter().flat_map(|r| &r.unsupported).collect();
        ignored.extend(fields.into_iter().map(ToString::to_string));
        if ignored.is_empty() { PolicyStatus::Active } else { PolicyStatus::Partial { ignored } }
    }

    /// How much of the mesh it can select: `mesh`, `namespace` or `workload`.
    pub fn reach(&self) -> &'static str {
        match self.scope {
            Scope::Named => "workload",
            _ if !self.selector.0.is_empty() => "workload",
            Scope::Mesh => "mesh",
            Scope::Namespace => "namespace",
        }
    }
}

/// What only policies and modes need to know of a workload. Kept beside the workloads: nothing that carries connections
/// reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadPolicy {
    /// What selectors look at.
    pub labels: Labels,
    /// Policies that the control plane says select it ([`Scope::Named`]). One that does not exist denies.
    pub policies: Vec<PolicyKey>,
    /// Who set [`super::Workload::mode`].
    pub mode_set_by: ModeSource,
}

/// A block of addresses in one spelling: no bits beyond its length, and IPv4-mapped IPv6 as IPv4.
pub fn canonical_block(block: IpNet) -> IpNet {
    /// Bits of `::ffff:0:0/96`, the IPv4-mapped addresses (RFC 4291, section 2.5.5.2).
    const MAPPED: u8 = 96;
    if let IpNet::V6(v6) = block
        && v6.prefix_len() >= MAPPED
        && let Some(v4) = v6.network().to_ipv4_mapped()
    {
        return IpNet::new_assert(IpAddr::V4(v4), v6.prefix_len() - MAPPED);
    }
    block.trunc()
}
