//! Versions of the CNI specification.

use std::fmt;

use super::ConflistError;

/// Versions of the specification that the plugin speaks. Before 0.3.0 there were no chains.
pub const SUPPORTED: [SpecVersion; 5] =
    [SpecVersion(0, 3, 0), SpecVersion(0, 3, 1), SpecVersion(0, 4, 0), SpecVersion(1, 0, 0), SpecVersion(1, 1, 0)];

/// A version of the specification: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SpecVersion(pub u16, pub u16, pub u16);

impl SpecVersion {
    /// The newest that the plugin speaks.
    pub const NEWEST: Self = SUPPORTED[SUPPORTED.len() - 1];

    /// Reads `1.0.0`. Nothing else that a semantic version may have was ever used.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.').map(|part| {
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| part.parse().ok()).flatten()
        });
        let version = Self(parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(version)
    }

    /// Whether the plugin speaks it.
    pub fn is_supported(self) -> bool {
        SUPPORTED.contains(&self)
    }

    /// What the plugin speaks, for messages.
    pub fn supported() -> String {
        SUPPORTED.map(|version| version.to_string()).join(", ")
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Whether the plugin speaks what a runtime may choose from a configuration: the highest version that it knows itself.
pub(super) fn check(version: Option<&str>, versions: &[String]) -> Result<(), ConflistError> {
    let named = || version.filter(|version| !version.is_empty()).into_iter().chain(versions.iter().map(String::as_str));
    let supported = SpecVersion::supported();
    let mut highest = None;
    for text in named() {
        let Some(version) = SpecVersion::parse(text) else {
            return Err(ConflistError::Version(format!("cniVersion {text:?} is no version such as 1.0.0")));
        };
        highest = highest.max(Some(version));
    }
    match highest {
        None => Err(ConflistError::Version(format!(
            "field \"cniVersion\" is missing, which means 0.1.0: a chained plugin needs one of {supported}"
        ))),
        Some(version) if version.is_supported() => Ok(()),
        Some(version) => Err(ConflistError::Version(format!(
            "cniVersion {version} is not supported by underpass-cni: it has to be one of {supported}"
        ))),
    }
}
