//! What annotations exclude.

use std::{collections::BTreeMap, fmt::Display, net::IpAddr};

use ipnet::IpNet;
use underpass_abi::is_agent_port;

use super::{
    names::{EXCLUDE_INBOUND_PORTS, EXCLUDE_OUTBOUND_CIDRS, EXCLUDE_OUTBOUND_PORTS},
    records::Excluded,
};

/// Most entries of one annotation.
const MAX_ENTRIES: usize = 256;
/// Longest piece of an annotation in a message, in characters.
const QUOTED: usize = 40;

/// Reads the annotations of an object. One that is wrong excludes nothing, and the problem says why: what is not excluded is
/// protected.
pub(super) fn excluded(annotations: &BTreeMap<String, String>) -> (Excluded, Vec<String>) {
    let mut problems = Vec::new();
    let excluded = Excluded {
        outbound_ports: list(annotations, EXCLUDE_OUTBOUND_PORTS, port, &mut problems),
        outbound_cidrs: list(annotations, EXCLUDE_OUTBOUND_CIDRS, network, &mut problems),
        inbound_ports: list(annotations, EXCLUDE_INBOUND_PORTS, port, &mut problems),
    };
    (excluded, problems)
}

fn list<T: PartialEq>(
    annotations: &BTreeMap<String, String>,
    name: &str,
    parse: fn(&str) -> Result<T, &'static str>,
    problems: &mut Vec<String>,
) -> Vec<T> {
    let Some(text) = annotations.get(name) else { return Vec::new() };
    let mut values = Vec::new();
    for entry in text.split(',').map(str::trim).filter(|e| !e.is_empty()) {
        match parse(entry) {
            Ok(value) if values.contains(&value) => {}
            Ok(_) if values.len() == MAX_ENTRIES => {
                problems.push(wrong(name, entry, format_args!("it has more than {MAX_ENTRIES} entries; list fewer")));
                return Vec::new();
            }
            Ok(value) => values.push(value),
            Err(problem) => {
                problems.push(wrong(name, entry, problem));
                return Vec::new();
            }
        }
    }
    values
}

fn wrong(name: &str, entry: &str, problem: impl Display) -> String {
    let shown: String = entry.chars().take(QUOTED).collect();
    format!("annotation {name}: {shown:?}: {problem}; until then it excludes nothing")
}

fn port(text: &str) -> Result<u16, &'static str> {
    match text.parse::<u16>() {
        Ok(port) if is_agent_port(port) => Err("it is one of the agent's own ports inside every pod; remove it"),
        Ok(port) if port > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err("it is no port; write whole numbers from 1 to 65535, separated by commas"),
    }
}

fn network(text: &str) -> Result<IpNet, &'static str> {
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    match net {
        Some(IpNet::V6(v6)) if v6.network().to_ipv4_mapped().is_some() => {
            Err("it is an IPv4 network written as IPv6; write it as IPv4")
        }
        Some(net) => Ok(net.trunc()),
        None => Err("it is no network; write ADDRESS/LENGTH, like 10.0.0.0/16 or fd00::/64, separated by commas"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::excluded;

    fn read(name: &str, value: &str) -> (super::Excluded, Vec<String>) {
        excluded(&BTreeMap::from([(name.to_owned(), value.to_owned())]))
    }

    #[test]
    fn lists_of_ports_and_networks() {
        let (e, problems) = read(super::EXCLUDE_OUTBOUND_PORTS, " 5432, 6379,5432,");
        assert_eq!((e.outbound_ports, problems), (vec![5432, 6379], vec![]));
        let (e, problems) = read(super::EXCLUDE_OUTBOUND_CIDRS, "10.1.2.3/16, fd00::1");
        let written: Vec<_> = e.outbound_cidrs.iter().map(ToString::to_string).collect();
        assert_eq!((written, problems), (vec!["10.1.0.0/16".to_owned(), "fd00::1/128".to_owned()], vec![]));
        let (e, _) = read(super::EXCLUDE_INBOUND_PORTS, "9090");
        assert_eq!(e.inbound_ports, [9090]);
    }

    #[test]
    fn what_is_wrong_excludes_nothing_and_is_said() {
        for (name, value, said) in [
            (super::EXCLUDE_OUTBOUND_PORTS, "80,http", "\"http\": it is no port"),
            (super::EXCLUDE_OUTBOUND_PORTS, "80,+81", "it is no port"),
            (super::EXCLUDE_INBOUND_PORTS, "15008", "agent's own ports"),
            (super::EXCLUDE_INBOUND_PORTS, "0", "it is no port"),
            (super::EXCLUDE_OUTBOUND_CIDRS, "10.0.0.0/33", "it is no network"),
            (super::EXCLUDE_OUTBOUND_CIDRS, "::ffff:10.0.0.0/104", "write it as IPv4"),
        ] {
            let (e, problems) = read(name, value);
            assert_eq!(e, super::Excluded::default(), "{value}");
            assert!(problems.len() == 1 && problems[0].contains(said) && problems[0].contains(name), "{problems:?}");
        }
    }
}
