//! What is measured.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A load and the way that it goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) load: Load,
    pub(super) way: Way,
    /// Whether each new connection has a full handshake; otherwise sessions are resumed where a system can.
    pub(super) cold: bool,
    /// The case of plain TCP that it is compared with.
    pub(super) baseline: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// One-way transfer on so many connections.
    Bulk(u32),
    /// Requests and answers of `size` bytes on `connections` kept open.
    Exchange { size: u32, connections: u32 },
    /// A new connection for each exchange of 64 bytes, so many at a time.
    Connect(u32),
    /// Connections that do nothing.
    Idle,
}

/// Where the server is, seen from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    OtherNode,
    SameNode,
}

/// The smallest number of something that its cost is told for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Per {
    /// 10⁹ bytes.
    #[serde(rename = "GB")]
    Gigabyte,
    #[serde(rename = "10k")]
    TenThousand,
}

/// Every case, in the order of the tables.
pub(super) static CASES: [Case; 14] = [
    case("bulk1", Load::Bulk(1)),
    case("bulk8", Load::Bulk(8)),
    case("rr64x1", Load::Exchange { size: 64, connections: 1 }),
    case("rr64x64", Load::Exchange { size: 64, connections: 64 }),
    case("rr1kx1", Load::Exchange { size: 1024, connections: 1 }),
    case("rr1kx64", Load::Exchange { size: 1024, connections: 64 }),
    case("crr1", Load::Connect(1)),
    case("crr16", Load::Connect(16)),
    Case { cold: true, baseline: "crr1", ..case("crr1-cold", Load::Connect(1)) },
    Case { cold: true, baseline: "crr16", ..case("crr16-cold", Load::Connect(16)) },
    Case { way: Way::SameNode, ..case("bulk1-same", Load::Bulk(1)) },
    Case { way: Way::SameNode, ..case("rr1kx1-same", Load::Exchange { size: 1024, connections: 1 }) },
    Case { way: Way::SameNode, ..case("crr1-same", Load::Connect(1)) },
    case("idle10k", Load::Idle),
];

const fn case(name: &'static str, load: Load) -> Case {
    Case { name, load, way: Way::OtherNode, cold: false, baseline: name }
}

impl Case {
    /// The one called `name`.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        CASES.iter().find(|case| case.name == name)
    }

    pub(super) fn per(&self) -> Per {
        if matches!(self.load, Load::Bulk(_)) { Per::Gigabyte } else { Per::TenThousand }
    }

    /// The unit of values measured in time.
    pub(super) fn rate(&self) -> &'static str {
        match self.load {
            Load::Bulk(_) => "Gbit/s",
            Load::Exchange { .. } => "requests/s",
            Load::Connect(_) => "connections/s",
            Load::Idle => "B/connection",
        }
    }

    /// The unit of values measured in instructions.
    pub(super) fn cost(&self) -> &'static str {
        match self.load {
            Load::Bulk(_) => "instructions/B",
            Load::Exchange { .. } => "instructions/request",
            Load::Connect(_) | Load::Idle => "instructions/connection",
        }
    }

    /// How much of it is measured when instructions are counted. An emulated processor needs up to half a minute for it.
    pub(super) fn amount(&self) -> u64 {
        match self.load {
            Load::Bulk(_) => 24 << 20,
            Load::Exchange { .. } => 1600,
            Load::Connect(_) => 64,
            Load::Idle => 0,
        }
    }

    pub(super) fn same_node(&self) -> bool {
        self.way == Way::SameNode
    }
}

impl Per {
    /// How many of what a load counts (bytes, answers).
    pub(super) fn count(self) -> f64 {
        match self {
            Self::Gigabyte => 1e9,
            Self::TenThousand => 1e4,
        }
    }
}

impl fmt::Display for Per {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gigabyte => "GB",
            Self::TenThousand => "10k",
        })
    }
}

/// `--case`
#[derive(Debug, Clone, Copy)]
pub(super) struct Chosen(pub(super) &'static Case);

impl FromStr for Chosen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = || CASES.iter().map(|case| case.name).collect::<Vec<_>>().join(", ");
        Case::named(text).map(Self).ok_or_else(|| format!("there is no such case; write one of {}", all()))
    }
}
