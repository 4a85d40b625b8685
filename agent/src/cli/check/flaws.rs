//! Flaws of kernels that other rows cannot try out, by version.
//!
//! The ranges are those of the kernel's own CVE records (`osv.dev/vulnerability/CVE-...`, made from the records of the Linux
//! CNA). Distributions mend flaws without changing the number, so a version says what may be, not what is.

use aya::util::KernelVersion;

use super::row::{Check, Row};

/// A kernel's version: three numbers.
type Version = (u8, u8, u16);

/// A flaw that matters to kernel TLS, or to what stands beside it.
struct Flaw {
    /// Name of the row.
    name: &'static str,
    /// The CVE, as people look it up.
    cve: &'static str,
    /// What can happen.
    what: &'static str,
    /// First affected version, first that is not.
    affected: &'static [(Version, Version)],
    /// What to do meanwhile.
    instead: &'static str,
}

const FLAWS: [Flaw; 3] = [
    Flaw {
        name: "cve-2026-23240",
        cve: "CVE-2026-23240",
        what: "closing a kernel TLS socket while it sends can use freed memory",
        // The records list no fix for the series between 5.3 and 6.12.
        affected: &[((5, 3, 0), (6, 12, 75)), ((6, 13, 0), (6, 18, 16)), ((6, 19, 0), (6, 19, 6))],
        instead: "update to 6.12.75, 6.18.16, 6.19.6 or 7.0 (older series have no fix); `run --ktls off` avoids kernel TLS",
    },
    Flaw {
        name: "cve-2026-23414",
        cve: "CVE-2026-23414",
        what: "decryption in kernel TLS can leak memory",
        affected: &[
            ((0, 0, 0), (6, 1, 168)),
            ((6, 2, 0), (6, 6, 131)),
            ((6, 7, 0), (6, 12, 80)),
            ((6, 13, 0), (6, 18, 21)),
            ((6, 19, 0), (6, 19, 11)),
        ],
        instead: "update to 6.1.168, 6.6.131, 6.12.80, 6.18.21, 6.19.11 or 7.0; `run --ktls off` avoids kernel TLS",
    },
    Flaw {
        name: "cve-2026-46102",
        cve: "CVE-2026-46102",
        what: "an aborted stream parser leaks memory",
        affected: &[
            ((4, 9, 0), (5, 10, 258)),
            ((5, 11, 0), (5, 15, 209)),
            ((5, 16, 0), (6, 1, 175)),
            ((6, 2, 0), (6, 6, 140)),
            ((6, 7, 0), (6, 12, 86)),
            ((6, 13, 0), (6, 18, 27)),
            ((6, 19, 0), (7, 0, 4)),
        ],
        instead: "update to 6.1.175, 6.6.140, 6.12.86, 6.18.27 or 7.0.4; Underpass meets the parser only through kernel TLS \
                  before Linux 6.0, other programs also through KCM and sockmaps",
    },
];

impl Flaw {
    /// Does a kernel of this version have the flaw, unless its distribution has mended it?
    fn affects(&self, version: KernelVersion) -> bool {
        let of = |(major, minor, patch): Version| KernelVersion::new(major, minor, patch);
        self.affected.iter().any(|(first, fixed)| version >= of(*first) && version < of(*fixed))
    }

    fn row(&self, version: Option<KernelVersion>) -> Row {
        let check = Check(self.name, false);
        match version {
            None => check
                .degraded(format!("the kernel's version cannot be told ({}: {})", self.cve, self.what), self.instead),
            Some(version) if self.affects(version) => check.degraded(
                format!("{}: {}; affected by version, unless the distribution has mended it", self.cve, self.what),
                self.instead,
            ),
            Some(_) => check.ok("mended, or never there, in this version"),
        }
    }
}

pub(super) fn rows() -> impl Iterator<Item = Row> {
    let version = KernelVersion::current().ok();
    FLAWS.iter().map(move |flaw| flaw.row(version))
}

#[cfg(test)]
mod tests {
    use super::{super::row::State, *};

    #[test]
    fn versions_on_both_sides_of_every_fix() {
        let affected = |name: &str, version: Version| {
            let flaw = FLAWS.iter().find(|flaw| flaw.name == name).unwrap();
            flaw.row(Some(KernelVersion::new(version.0, version.1, version.2))).state == State::Degraded
        };
        for (name, version, expected) in [
            ("cve-2026-23240", (5, 2, 9), false),
            ("cve-2026-23240", (6, 1, 192), true),
            ("cve-2026-23240", (6, 12, 74), true),
            ("cve-2026-23240", (6, 12, 75), false),
            ("cve-2026-23240", (6, 17, 99), true),
            ("cve-2026-23240", (6, 18, 16), false),
            ("cve-2026-23240", (7, 0, 0), false),
            ("cve-2026-23414", (6, 1, 167), true),
            ("cve-2026-23414", (6, 1, 168), false),
            ("cve-2026-23414", (6, 18, 20), true),
            ("cve-2026-23414", (6, 18, 21), false),
            ("cve-2026-23414", (6, 19, 10), true),
            ("cve-2026-23414", (7, 2, 13), false),
            ("cve-2026-46102", (6, 12, 85), true),
            ("cve-2026-46102", (6, 12, 117), false),
            ("cve-2026-46102", (7, 0, 3), true),
            ("cve-2026-46102", (7, 0, 4), false),
        ] {
            assert_eq!(affected(name, version), expected, "{name} {version:?}");
        }
        let unknown = FLAWS[0].row(None);
        assert!(unknown.state == State::Degraded && unknown.detail.contains("CVE-2026-23240"), "{unknown:?}");
    }
}
