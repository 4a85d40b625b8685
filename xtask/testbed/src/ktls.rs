//! What the kernel itself says about kernel TLS in a pod.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::pod::Pod;

/// The tunnel's port.
const TUNNEL: &str = ":15008";

impl Pod {
    /// The pod's counters about kernel TLS (`/proc/net/tls_stat`), by name; empty where the kernel has none.
    pub fn tls_stat(&self) -> Result<BTreeMap<String, u64>> {
        let text = self.enter(|| std::fs::read_to_string("/proc/thread-self/net/tls_stat").unwrap_or_default())?;
        let number = |line: &str| {
            let (name, value) = line.split_once(char::is_whitespace)?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        };
        Ok(text.lines().filter_map(number).collect())
    }

    /// Established sockets of the tunnel that `ss` shows with kernel TLS in both directions.
    pub fn ktls_sockets(&self) -> Result<usize> {
        let text = self
            .check(&["ss", "--tcp", "--numeric", "--info", "--extended", "--no-header", "state", "established"])
            .context("asking ss")?;
        let keyed = |socket: &&String| {
            let both = socket.contains("rxconf: sw") && socket.contains("txconf: sw");
            both && socket.contains(TUNNEL)
        };
        Ok(sockets(&text).iter().filter(keyed).count())
    }
}

/// One text per socket: `ss` continues on lines that begin with white space.
fn sockets(text: &str) -> Vec<String> {
    text.lines().fold(Vec::new(), |mut all: Vec<String>, line| {
        match all.last_mut() {
            Some(last) if line.starts_with(char::is_whitespace) => last.push_str(line),
            _ => all.push(line.to_owned()),
        }
        all
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn sockets_of_several_lines() {
        let text = "0 0 10.0.0.1:1 10.0.0.2:15008 ino:1\n\t tcp-ulp-tls rxconf: sw txconf: sw cubic\n0 0 a b\n";
        let sockets = super::sockets(text);
        assert_eq!(sockets.len(), 2);
        assert!(sockets[0].contains(":15008") && sockets[0].ends_with("cubic"));
    }
}
