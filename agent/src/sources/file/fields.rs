//! Checks of single values: ports, addresses, networks, names, paths, durations.

use std::{
    collections::HashSet,
    fmt::Display,
    net::IpAddr,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use serde_saphyr::{Location, Spanned};
use underpass_abi::is_agent_port;

use super::{
    ConfigError,
    schema::{Exclude, Mode},
    yaml::{positioned, quoted},
};
use crate::mesh::{Exclusions, InboundMode, check_name};

/// Longest path the kernel takes, in bytes, with its terminator (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// Knows the file's name and makes positioned errors.
#[derive(Clone, Copy)]
pub(super) struct Check<'a> {
    pub(super) file: &'a str,
}

impl Check<'_> {
    /// An error about the value at `at`.
    pub(super) fn error(self, at: Location, field: &str, problem: impl Display) -> ConfigError {
        positioned(self.file, at, field, &problem.to_string())
    }

    /// An error about a positioned value.
    pub(super) fn wrong<T>(self, value: &Spanned<T>, field: &str, problem: impl Display) -> ConfigError {
        self.error(value.referenced, field, problem)
    }

    /// A port an application can have.
    pub(super) fn port(self, field: &str, port: &Spanned<u16>) -> Result<u16, ConfigError> {
        match port.value {
            0 => Err(self.wrong(port, field, "port 0 does not exist; write a number from 1 to 65535")),
            p if is_agent_port(p) => Err(self.wrong(
                port,
                field,
                format!("port {p} is one of the agent's own inside every pod; use another port"),
            )),
            p => Ok(p),
        }
    }

    /// A list of distinct ports.
    pub(super) fn ports(self, field: &str, ports: &[Spanned<u16>]) -> Result<Vec<u16>, ConfigError> {
        let mut seen = HashSet::new();
        let mut out = Vec::with_capacity(ports.len());
        for (i, port) in ports.iter().enumerate() {
            let field = format!("{field}[{i}]");
            let p = self.port(&field, port)?;
            if !seen.insert(p) {
                return Err(self.wrong(port, &field, format!("port {p} is listed twice; remove one")));
            }
            out.push(p);
        }
        Ok(out)
    }

    /// An address in canonical form (IPv4-mapped IPv6 becomes IPv4).
    pub(super) fn address(self, field: &str, text: &Spanned<String>) -> Result<IpAddr, ConfigError> {
        text.value.parse::<IpAddr>().map(|a| a.to_canonical()).map_err(|_| {
            self.wrong(
                text,
                field,
                format!("{} is no IP address; write one like 10.0.0.1 or \"fd00::1\"", quoted(&text.value)),
            )
        })
    }

    fn network(self, field: &str, text: &Spanned<String>) -> Result<IpNet, ConfigError> {
        let value = quoted(&text.value);
        let net: IpNet = text.value.parse().map_err(|_| {
            self.wrong(
                text,
                field,
                format!("{value} is no network; write ADDRESS/LENGTH, like 10.0.0.0/16 or \"fd00::/64\""),
            )
        })?;
        if net.trunc() != net {
            let problem = format!("{value} has bits set beyond its length; write {}", net.trunc());
            return Err(self.wrong(text, field, problem));
        }
        if let IpNet::V6(v6) = net
            && v6.network().to_ipv4_mapped().is_some()
        {
            let problem = format!("{value} is an IPv4 network written as IPv6; write it as IPv4");
            return Err(self.wrong(text, field, problem));
        }
        Ok(net)
    }

    /// A network to capture: one that other nodes' pods can have.
    pub(super) fn captured_network(self, field: &str, text: &Spanned<String>) -> Result<IpNet, ConfigError> {
        let net = self.network(field, text)?;
        let value = quoted(&text.value);
        if net.prefix_len() == 0 {
            let problem = format!("{value} is every address; set mesh.captureAll: true instead");
            return Err(self.wrong(text, field, problem));
        }
        let first = net.network();
        let link_local = match first {
            IpAddr::V4(a) => a.is_link_local(),
            IpAddr::V6(a) => a.is_unicast_link_local(),
        };
        if first.is_loopback() || first.is_multicast() || link_local {
            let problem = format!(
                "{value} is loopback, link-local or multicast, which never leaves a pod for another node; remove it"
            );
            return Err(self.wrong(text, field, problem));
        }
        Ok(net)
    }

    /// What is left alone.
    pub(super) fn exclusions(self, field: &str, exclude: &Exclude) -> Result<Exclusions, ConfigError> {
        Ok(Exclusions {
            outbound_ports: self.ports(&format!("{field}.outboundPorts"), &exclude.outbound_ports)?,
            outbound_cidrs: exclude
                .outbound_cidrs
                .iter()
                .enumerate()
                .map(|(i, c)| self.network(&format!("{field}.outboundCIDRs[{i}]"), c))
                .collect::<Result<_, _>>()?,
            inbound_ports: self.ports(&format!("{field}.inboundPorts"), &exclude.inbound_ports)?,
        })
    }

    /// A Kubernetes name.
    pub(super) fn name(self, what: &'static str, field: &str, name: &Spanned<String>) -> Result<(), ConfigError> {
        check_name(what, &name.value).map_err(|e| self.wrong(name, field, e))
    }

    /// Something the mesh model parses, with its own message.
    pub(super) fn parsed<T>(self, field: &str, text: &Spanned<String>) -> Result<T, ConfigError>
    where
        T: std::str::FromStr<Err: Display>,
    {
        text.value.parse().map_err(|e| self.wrong(text, field, e))
    }

    /// An absolute path without `..`, in one spelling (no `.` and no doubled slashes).
    pub(super) fn path(self, field: &str, text: &Spanned<String>) -> Result<PathBuf, ConfigError> {
        let path = Path::new(&text.value);
        let ok = path.is_absolute()
            && text.value.len() < MAX_PATH
            && !text.value.contains('\0')
            && !path.components().any(|c| c == Component::ParentDir);
        if ok {
            return Ok(path.components().collect());
        }
        let problem =
            format!("{} must be an absolute path without \"..\", shorter than {MAX_PATH} bytes", quoted(&text.value));
        Err(self.wrong(text, field, problem))
    }

    /// A duration between `least` and `most`.
    pub(super) fn duration(
        self,
        field: &str,
        text: &Spanned<String>,
        least: Duration,
        most: Duration,
    ) -> Result<Duration, ConfigError> {
        let value = quoted(&text.value);
        let duration = humantime::parse_duration(&text.value).map_err(|_| {
            self.wrong(text, field, format!("{value} is no duration; write a number and a unit, like 30s, 15m or 24h"))
        })?;
        if duration < least || duration > most {
            let (least, most) = (humantime::format_duration(least), humantime::format_duration(most));
            return Err(self.wrong(text, field, format!("{value} is out of range; write {least} to {most}")));
        }
        Ok(duration)
    }
}

/// The model's name for a mode.
pub(super) fn mode(mode: Mode) -> InboundMode {
    match mode {
        Mode::Permissive => InboundMode::Permissive,
        Mode::Strict => InboundMode::Strict,
    }
}
