//! What is compared.

use std::{path::Path, process::Command, str::FromStr};

use super::case::{Case, Load};

/// Something that protects connections, or plain TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct System {
    pub(super) name: String,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    /// Kernel TLS on the applications' own sockets.
    OwnKtls,
    WireGuard,
    Nginx,
    Stunnel,
    Underpass {
        ktls: bool,
        /// Whether it is the agent of `--against`.
        against: bool,
    },
    Peer(Peer),
}

/// `--peer NAME=COMMAND`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) name: String,
    pub(super) command: String,
}

/// What this machine's kernel can do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Abilities {
    pub(super) ktls: bool,
    pub(super) wireguard: bool,
}

/// Names of the systems that are always known, in the order of the tables.
pub(super) const NAMES: [&str; 7] =
    ["plain", "ktls-own-socket", "wireguard", "nginx", "stunnel", "underpass-user", "underpass-ktls"];

impl System {
    /// Those that this machine can run, in the order of the tables.
    pub(super) fn all(abilities: Abilities, peers: &[Peer], against: bool) -> Vec<Self> {
        let mut kinds = vec![Kind::Plain];
        kinds.extend(abilities.ktls.then_some(Kind::OwnKtls));
        kinds.extend(abilities.wireguard.then_some(Kind::WireGuard));
        kinds.extend([Kind::Nginx, Kind::Stunnel]);
        kinds.extend(peers.iter().cloned().map(Kind::Peer));
        for ktls in [false, true].into_iter().filter(|ktls| !ktls || abilities.ktls) {
            kinds.extend(against.then_some(Kind::Underpass { ktls, against: true }));
            kinds.push(Kind::Underpass { ktls, against: false });
        }
        kinds.into_iter().map(|kind| Self { name: kind.name(), kind }).collect()
    }

    /// Whether it makes sense to measure a case of it.
    pub(super) fn has(&self, case: &Case) -> bool {
        let proxy = self.is_proxy();
        match (&self.kind, case.load) {
            _ if case.cold => proxy,
            // One has no handshake, and neither has memory of its own for a connection.
            (Kind::OwnKtls, Load::Connect(_)) | (Kind::OwnKtls | Kind::WireGuard, Load::Idle) => false,
            // It protects what is between nodes.
            (Kind::WireGuard, _) => !case.same_node(),
            _ => true,
        }
    }

    /// Whether processes of its own carry the connections.
    pub(super) fn is_proxy(&self) -> bool {
        !matches!(self.kind, Kind::Plain | Kind::OwnKtls | Kind::WireGuard)
    }
}

impl Kind {
    fn name(&self) -> String {
        match self {
            Self::Plain => "plain".into(),
            Self::OwnKtls => "ktls-own-socket".into(),
            Self::WireGuard => "wireguard".into(),
            Self::Nginx => "nginx".into(),
            Self::Stunnel => "stunnel".into(),
            Self::Underpass { ktls, against } => {
                format!("underpass-{}{}", if *ktls { "ktls" } else { "user" }, if *against { "-against" } else { "" })
            }
            Self::Peer(peer) => peer.name.clone(),
        }
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((name, command)) = text.split_once('=').filter(|(_, command)| !command.trim().is_empty()) else {
            return Err("write NAME=COMMAND; docs/performance.md says what COMMAND is told".into());
        };
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if !(1..=24).contains(&name.len()) || !name.bytes().all(fits) {
            return Err(format!("the name {name:?} does not fit; write 1 to 24 characters of a-z, 0-9 and -"));
        }
        if NAMES.contains(&name) {
            return Err(format!("the name {name} is taken; write another one"));
        }
        Ok(Self { name: name.to_owned(), command: command.to_owned() })
    }
}

impl Abilities {
    /// Loads the modules if there are any.
    pub(super) fn of_kernel() -> Self {
        let load = |module: &str| {
            // It fails when the kernel has no modules; what counts is asked below.
            let _ = Command::new("modprobe").arg("--quiet").arg(module).output();
        };
        ["tls", "wireguard"].into_iter().for_each(load);
        let upper_layers = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_ulp").unwrap_or_default();
        Self {
            ktls: upper_layers.split_whitespace().any(|layer| layer == "tls"),
            wireguard: Path::new("/sys/module/wireguard").exists(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::case::CASES, Abilities, Peer, System};

    #[test]
    fn peers() {
        let peer: Peer = "ghostunnel=exec ghostunnel --a=b".parse().unwrap();
        assert_eq!((peer.name.as_str(), peer.command.as_str()), ("ghostunnel", "exec ghostunnel --a=b"));
        for (text, remedy) in [("x", "NAME=COMMAND"), ("x= ", "NAME=COMMAND"), ("X=y", "a-z"), ("nginx=y", "another")] {
            let error = text.parse::<Peer>().unwrap_err();
            assert!(error.contains(remedy), "{text}: {error}");
        }
    }

    #[test]
    fn systems_of_a_machine() {
        let names = |abilities, against| {
            let peers = ["other=x".parse().unwrap()];
            System::all(abilities, &peers, against).into_iter().map(|system| system.name).collect::<Vec<_>>()
        };
        let little = Abilities { ktls: false, wireguard: false };
        assert_eq!(names(little, false), ["plain", "nginx", "stunnel", "other", "underpass-user"]);
        let much = Abilities { ktls: true, wireguard: true };
        let all = names(much, true).into_iter().filter(|name| name != "other" && !name.ends_with("-against"));
        assert_eq!(all.collect::<Vec<_>>(), super::NAMES);
    }

    #[test]
    fn every_case_has_a_baseline() {
        let plain = &System::all(Abilities { ktls: false, wireguard: false }, &[], false)[0];
        for case in &CASES {
            let baseline = CASES.iter().find(|other| other.name == case.baseline).unwrap();
            assert!(plain.has(baseline), "{}", case.name);
        }
    }
}
