//! What `cargo xtask vm` tells the first process of a test machine, and what that answers.
//!
//! The machine finds its [`Plan`] at [`PLAN`] in its initramfs. It writes [`Report`]s to [`CHANNEL`], one JSON object a line.

#![forbid(unsafe_code)]

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Where the plan is.
pub const PLAN: &str = "/plan.json";
/// The second serial port; the first one is the kernel's console.
pub const CHANNEL: &str = "/dev/ttyS1";
/// Where programs are, for `PATH`.
pub const PROGRAMS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most bytes of a test's output that are reported; the end of it is kept. A serial port is slow.
pub const OUTPUT_BYTES: usize = 32 << 10;

/// What to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Tests that run at a time.
    pub jobs: usize,
    /// Environment of every test; nothing else is in it.
    pub environment: BTreeMap<String, String>,
    /// The tests, in the order in which they start.
    pub tests: Vec<Test>,
    /// A program to run behind them, alone.
    pub program: Option<Program>,
}

/// A program whose output is wanted as it comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The program.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Seconds after which it is killed.
    pub limit: u64,
}

/// One test of one test program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Test {
    /// What people call the program, e.g. `e2e`.
    pub suite: String,
    /// The test's full name in it.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Working directory: the package's, as under cargo.
    pub directory: PathBuf,
    /// Times that it is tried again after a failure: alone, when all others have ended.
    pub retries: u32,
    /// Seconds after which one try is killed.
    pub limit: u64,
}

/// What the machine says. Tests are named by their number in the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "report")]
pub enum Report {
    /// All is mounted; the first test is about to start.
    Ready {
        /// The kernel's release.
        kernel: String,
        /// Seconds since the kernel started.
        uptime: f64,
        /// Active security modules, separated by commas.
        lsm: String,
    },
    /// A test starts.
    Started {
        /// Its number.
        test: usize,
    },
    /// A try of a test has ended.
    Ended {
        /// Its number.
        test: usize,
        /// Whether it passed, and if not what happened.
        failure: Option<String>,
        /// Whether it will be tried again.
        again: bool,
        /// How long this try took.
        seconds: f64,
        /// The end of what it printed; empty when it passed.
        output: String,
    },
    /// The plan's program has printed a line.
    Said {
        /// The line, without its end.
        line: String,
        /// Whether on standard error.
        aside: bool,
    },
    /// The plan's program has ended.
    Finished {
        /// What happened, if it failed.
        failure: Option<String>,
    },
    /// All of the plan has been run; the machine goes off.
    Done,
    /// The machine cannot go on.
    Broken {
        /// Why.
        reason: String,
    },
}
