//! SPIFFE identities of the form `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

use std::{fmt, str::FromStr, sync::Arc};

/// Longest SPIFFE ID in bytes (SPIFFE-ID specification, section 2.3).
const MAX_SPIFFE_ID: usize = 2048;
/// Longest trust domain name in bytes (SPIFFE-ID specification, section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;
/// Longest Kubernetes namespace or service account name: a DNS subdomain (RFC 1123).
const MAX_NAME: usize = 253;

/// Why a string is not an identity Underpass accepts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not `spiffe://td/ns/NAMESPACE/sa/ACCOUNT`.
    #[error("{0:?} is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT")]
    Form(String),
    /// A trust domain with characters outside `[a-z0-9._-]`, empty or too long.
    #[error("trust domain {0:?} must be 1 to {MAX_TRUST_DOMAIN} characters of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain(String),
    /// A namespace or service account that is no RFC 1123 subdomain.
    #[error(
        "{what} {value:?} must be an RFC 1123 name: a-z, 0-9, '-' and '.', starting and ending with a letter or digit"
    )]
    Name {
        /// Which part.
        what: &'static str,
        /// What it was.
        value: String,
    },
}

/// A SPIFFE trust domain name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let ok = !s.is_empty()
            && s.len() <= MAX_TRUST_DOMAIN
            && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_'));
        if ok { Ok(Self(s.into())) } else { Err(IdentityError::TrustDomain(shorten(s))) }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A workload's identity. Cheap to clone; compares as its parts do.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    /// Puts an identity together, checking the names.
    pub fn new(trust_domain: TrustDomain, namespace: &str, service_account: &str) -> Result<Self, IdentityError> {
        check_name("namespace", namespace)?;
        check_name("service account", service_account)?;
        Ok(Self { trust_domain, namespace: namespace.into(), service_account: service_account.into() })
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let form = || IdentityError::Form(shorten(s));
        if s.len() > MAX_SPIFFE_ID {
            return Err(form());
        }
        let mut parts = s.strip_prefix("spiffe://").ok_or_else(form)?.split('/');
        let (Some(td), Some("ns"), Some(ns), Some("sa"), Some(sa), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        Self::new(td.parse()?, ns, sa)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for SpiffeId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// Checks an RFC 1123 subdomain, which is what Kubernetes allows in both places.
pub(crate) fn check_name(what: &'static str, value: &str) -> Result<(), IdentityError> {
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = value.as_bytes();
    let ok = value.len() <= MAX_NAME
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.'));
    if ok { Ok(()) } else { Err(IdentityError::Name { what, value: shorten(value) }) }
}

/// Foreign text in an error message stays short.
fn shorten(s: &str) -> String {
    if s.chars().count() <= 80 { s.to_owned() } else { s.chars().take(77).chain("...".chars()).collect() }
}
