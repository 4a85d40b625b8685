//! What the demo claims, and whether it is so.

use std::{fmt::Write as _, path::PathBuf};

use console::{Alignment, pad_str, style};
use serde_json::{Value, json};

use super::scene::{Observation, Tunnel};

/// Everything that was seen.
pub(super) struct Report {
    pub(super) without: Observation,
    pub(super) with: Observation,
    pub(super) tunnel: Tunnel,
    pub(super) programs_unchanged: bool,
    /// Kernel objects left after the end.
    pub(super) left: Vec<PathBuf>,
    /// The kernel has TLS, so it has to be used.
    pub(super) expect_ktls: bool,
}

impl Report {
    /// Whether every claim holds.
    pub(super) fn ok(&self) -> bool {
        self.failed().is_empty()
    }

    /// The claims that do not hold.
    pub(super) fn failed(&self) -> Vec<&'static str> {
        self.claims().into_iter().filter(|(_, holds)| !holds).map(|(claim, _)| claim).collect()
    }

    fn claims(&self) -> Vec<(&'static str, bool)> {
        let (with, without) = (&self.with.wire, &self.without.wire);
        let mut claims = vec![
            (
                "the sniffer finds plaintext when there is some",
                without.plaintext_packets > 0 && without.marker_hits > 0,
            ),
            ("no plaintext between the nodes", with.plaintext_packets == 0 && with.dropped_by_kernel == 0),
            ("TLS records between the nodes instead", with.tls_application_records > 0),
            (
                "mutual TLS with both identities, the same at both ends",
                self.tunnel.accepted > 0 && self.identities_agree(),
            ),
            ("the kernel says of the data path what the agents say", self.kernel_agrees()),
            ("the server sees the client's own address", self.source_ip_preserved()),
            ("STRICT refuses a client outside the mesh", self.strict_refused()),
            ("the programs were neither restarted nor changed", self.programs_unchanged),
            ("throughput was measured", self.with.gigabits > 0.0 && self.with.requests > 0.0),
            ("nothing is left behind", self.left.is_empty()),
        ];
        if self.expect_ktls {
            let ktls = |end: &Value| end["data_path"] == "ktls";
            claims.push((
                "the kernel protects the records, at both ends",
                ktls(&self.tunnel.outbound) && ktls(&self.tunnel.inbound),
            ));
        }
        claims
    }

    /// The client outside was served before, and the clients inside are served still: the refusal is not an outage.
    fn strict_refused(&self) -> bool {
        self.without.outside_served && !self.with.outside_served
    }

    fn source_ip_preserved(&self) -> bool {
        [&self.without, &self.with]
            .iter()
            .all(|half| !half.sources.is_empty() && half.sources.iter().all(|s| *s == half.client))
    }

    fn identities_agree(&self) -> bool {
        let identities = |end: &Value| [identity(end, "source_identity"), identity(end, "destination_identity")];
        let (here, there) = (identities(&self.tunnel.outbound), identities(&self.tunnel.inbound));
        here.iter().all(|identity| identity.starts_with("spiffe://")) && here == there
    }

    /// `/proc/net/tls_stat` and `ss` in both pods: with kernel TLS every tunnel is there, without it none.
    fn kernel_agrees(&self) -> bool {
        [(&self.tunnel.outbound, 0), (&self.tunnel.inbound, 1)].into_iter().all(|(end, side)| {
            let kernel = &self.tunnel.kernel[side];
            let with = kernel.sending > 0 && kernel.receiving > 0 && kernel.sockets > 0 && kernel.decrypt_errors == 0;
            let without = kernel.sending == 0 && kernel.receiving == 0 && kernel.sockets == 0;
            if end["data_path"] == "ktls" { with } else { without }
        })
    }

    /// One object, for scripts.
    pub(super) fn json(&self) -> Value {
        let claims: serde_json::Map<_, _> =
            self.claims().into_iter().map(|(claim, holds)| (claim.to_owned(), json!(holds))).collect();
        let (with, without, inbound) = (&self.with, &self.without, &self.tunnel.inbound);
        json!({
            "ok": self.ok(),
            "plaintext_packets": with.wire.plaintext_packets,
            "control_plaintext_packets": without.wire.plaintext_packets,
            "mtls_connections": self.tunnel.accepted,
            "datapath": inbound["data_path"],
            "kernel": self.tunnel.kernel,
            "cipher": inbound["cipher"],
            "client_identity": inbound["source_identity"],
            "server_identity": inbound["destination_identity"],
            "source_ip_preserved": self.source_ip_preserved(),
            "strict_refused": self.strict_refused(),
            "programs_unchanged": self.programs_unchanged,
            "plain_gbit_s": without.gigabits,
            "underpass_gbit_s": with.gigabits,
            "throughput_ratio": with.gigabits / without.gigabits,
            "plain_requests_s": without.requests,
            "underpass_requests_s": with.requests,
            "requests_ratio": with.requests / without.requests,
            "left_behind": self.left,
            "claims": claims,
            "without": without,
            "with": with,
        })
    }

    /// Side by side, for people.
    pub(super) fn table(&self) -> String {
        let (with, without, inbound) = (&self.with, &self.without, &self.tunnel.inbound);
        let mut text = String::new();
        let mut row = |name: &str, left: String, right: String| {
            // Nothing can go wrong when writing to a string.
            let _ = writeln!(text, "  {} {} {right}", column(name, 26), column(&left, 34));
        };
        let heading = |heading: &str| style(heading).bold().to_string();
        row("", heading("without Underpass"), heading("with Underpass"));
        row("plaintext on the wire", bad(packets(without.wire.plaintext_packets)), {
            let seen = packets(with.wire.plaintext_packets);
            if with.wire.plaintext_packets == 0 { good(seen) } else { bad(seen) }
        });
        row("TLS on port 15008", packets(without.wire.tcp_15008_payload), good(packets(with.wire.tcp_15008_payload)));
        row("client identity", "none".into(), good(identity(inbound, "source_identity")));
        row("server identity", "none".into(), good(identity(inbound, "destination_identity")));
        let path = format!("{}, {}", plain(&inbound["data_path"]), plain(&inbound["cipher"]));
        row("data path", "plain TCP".into(), format!("{path}; {} connections", self.tunnel.accepted));
        row("nginx sees the client as", sources(without), sources(with));
        row("client outside the mesh", served(without), served(with));
        row("iperf3", format!("{:.2} Gbit/s", without.gigabits), ratio(with.gigabits, without.gigabits, "Gbit/s", 2));
        row(
            "redis GET",
            format!("{:.0} requests/s", without.requests),
            ratio(with.requests, without.requests, "requests/s", 0),
        );
        text.push('\n');
        for (claim, holds) in self.claims() {
            let _ = writeln!(text, "  {} {claim}", if holds { style("✓").green() } else { style("✗").red().bold() });
        }
        text
    }
}

fn column(text: &str, width: usize) -> String {
    pad_str(text, width, Alignment::Left, None).into_owned()
}

fn good(text: String) -> String {
    style(text).green().to_string()
}

fn bad(text: String) -> String {
    style(text).red().to_string()
}

fn packets(count: u64) -> String {
    format!("{count} packets")
}

fn plain(value: &Value) -> &str {
    value.as_str().unwrap_or("unknown")
}

fn identity(connection: &Value, which: &str) -> String {
    plain(&connection[which]).to_owned()
}

fn sources(half: &Observation) -> String {
    let mut sources = half.sources.clone();
    sources.dedup();
    sources.join(", ")
}

fn served(half: &Observation) -> String {
    if half.outside_served { "served".into() } else { "refused".into() }
}

fn ratio(with: f64, without: f64, unit: &str, digits: usize) -> String {
    format!("{with:.digits$} {unit} ({:.2} of plain)", with / without)
}
