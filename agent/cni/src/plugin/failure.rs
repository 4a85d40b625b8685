//! What the plugin answers a runtime when it cannot do what it was asked.

use serde::Serialize;

/// The specification's codes, and from 100 on our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Another version of the specification is wanted.
    Version = 1,
    /// An environment variable cannot be used.
    Environment = 4,
    /// Standard input cannot be read.
    Io = 5,
    /// Standard input is not JSON.
    Decode = 6,
    /// The configuration says something impossible.
    Config = 7,
    /// It may go better later, without anybody's help.
    TryLater = 11,
    /// No pod can be added.
    Unavailable = 50,
    /// The agent has refused the pod.
    Refused = 100,
}

/// One failure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: Code,
    /// For people: what failed, and what to do.
    pub message: String,
}

impl Failure {
    pub(super) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The specification's JSON object.
    pub fn to_json(&self, version: &str) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Answer<'a> {
            cni_version: &'a str,
            code: u16,
            msg: &'a str,
        }
        let answer = Answer { cni_version: version, code: self.code as u16, msg: &self.message };
        serde_json::to_string(&answer).expect("strings and numbers are JSON")
    }
}
