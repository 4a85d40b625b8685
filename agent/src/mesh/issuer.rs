//! What a node is told about the authority that it asks for certificates.

use std::{fmt, net::Ipv6Addr, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use super::identity::check_name;

/// An authority that speaks Istio's certificate service: `underpass ca`, istiod, istio-csr.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IstioCa {
    /// Where it is.
    pub address: CaAddress,
    /// PEM roots that its server certificate is checked with.
    pub root_file: PathBuf,
    /// Token of the agent's `ServiceAccount`, with the authority's audience.
    pub token_file: PathBuf,
    /// Name of the cluster (header `clusterid`), which istiod picks its token reviewer by.
    pub cluster_id: String,
    /// Lifetime asked for. The authority may give less.
    pub lifetime: Duration,
    /// Name in its server certificate, when it is not the address' host.
    pub server_name: Option<String>,
}

/// `https://HOST:PORT`
#[derive(Clone, PartialEq, Eq)]
pub struct CaAddress {
    host: Arc<str>,
    port: u16,
}

impl CaAddress {
    /// Host name or IP address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no address of an authority; write https://HOST:PORT, like https://underpass-ca.underpass-system.svc:15012"
)]
pub struct CaAddressError(String);

impl FromStr for CaAddress {
    type Err = CaAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || CaAddressError(text.chars().take(80).collect());
        let authority = text.strip_prefix("https://").ok_or_else(error)?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (host, port) = authority.rsplit_once(':').ok_or_else(error)?;
        let port = port.parse().ok().filter(|p| *p != 0).ok_or_else(error)?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) => v6.parse::<Ipv6Addr>().map_err(|_| error())?.to_string(),
            None => check_name("host", host).map(|()| host.to_owned()).map_err(|_| error())?,
        };
        Ok(Self { host: host.into(), port })
    }
}

impl fmt::Display for CaAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "https://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "https://{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Debug for CaAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, host, port) in [
            ("https://underpass-ca.underpass-system.svc:15012", "underpass-ca.underpass-system.svc", 15012),
            ("https://istiod.istio-system.svc:15012/", "istiod.istio-system.svc", 15012),
            ("https://10.0.0.1:1", "10.0.0.1", 1),
            ("https://[fd00::1]:15012", "fd00::1", 15012),
        ] {
            let address: CaAddress = text.parse().unwrap();
            assert_eq!((address.host(), address.port()), (host, port));
            assert_eq!(address.to_string(), text.trim_end_matches('/'));
        }
        for text in [
            "",
            "ca:15012",
            "http://ca:15012",
            "https://ca",
            "https://ca:0",
            "https://ca:x",
            "https://a@b:1",
            "https://[x]:1",
            "https://:1",
        ] {
            let error = text.parse::<CaAddress>().unwrap_err().to_string();
            assert!(error.contains("write https://HOST:PORT"), "{error}");
        }
    }
}
