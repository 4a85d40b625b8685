//! One line of the result.

use std::{fmt::Display, io};

use serde::Serialize;

/// How something was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As wanted.
    Ok,
    /// Something else is used instead.
    Degraded,
    /// Not there.
    Missing,
}

impl State {
    /// The word in tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Degraded => "degraded",
            State::Missing => "missing",
        }
    }
}

/// What was looked at, and what came out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Stable name.
    pub name: &'static str,
    /// How it was found.
    pub state: State,
    /// Whether the agent cannot run without it.
    pub required: bool,
    /// What was found.
    pub detail: String,
    /// What is used instead, when degraded.
    pub instead: Option<String>,
    /// What to do, when missing.
    pub remedy: Option<String>,
}

/// The name of a row and whether it is required: the beginning of every result.
#[derive(Debug, Clone, Copy)]
pub(super) struct Check(pub(super) &'static str, pub(super) bool);

impl Check {
    pub(super) fn ok(self, detail: impl Display) -> Row {
        self.row(State::Ok, detail)
    }

    pub(super) fn degraded(self, detail: impl Display, instead: impl Display) -> Row {
        Row { instead: Some(instead.to_string()), ..self.row(State::Degraded, detail) }
    }

    pub(super) fn missing(self, detail: impl Display, remedy: impl Display) -> Row {
        Row { remedy: Some(remedy.to_string()), ..self.row(State::Missing, detail) }
    }

    /// A probe that failed: for want of rights, or because the kernel has no such thing.
    pub(super) fn failed(self, what: impl Display, error: &io::Error, remedy: impl Display) -> Row {
        if matches!(error.raw_os_error(), Some(nix::libc::EPERM | nix::libc::EACCES)) {
            return self.missing(format!("{what}: {error}"), "run as root, or with the capabilities listed below");
        }
        self.missing(format!("{what}: {error}"), remedy)
    }

    fn row(self, state: State, detail: impl Display) -> Row {
        Row { name: self.0, required: self.1, state, detail: detail.to_string(), instead: None, remedy: None }
    }
}
