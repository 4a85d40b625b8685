//! How a pod's network looks from inside: interfaces, addresses, rules, routes and the settings that the agent changes.

use std::{fmt::Write as _, fs, io, path::Path};

use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage, rule::RuleMessage};

use crate::capture::{
    self, garbage, interfaces,
    netns::{Netns, netlink::Channel},
};

/// Tables of the network namespace that the reading thread is in, as the kernel writes them (`proc_pid_net(5)`).
const TABLES: [&str; 6] = ["dev", "if_inet6", "fib_trie", "route", "ipv6_route", "sockstat"];
/// Settings that the agent sets, and those that decide whether its way back works.
const SETTINGS: [&str; 6] = [
    "ipv4/tcp_fwmark_accept",
    "ipv4/fwmark_reflect",
    "ipv6/fwmark_reflect",
    "ipv4/conf/all/rp_filter",
    "ipv6/conf/all/disable_ipv6",
    "ipv4/ip_local_port_range",
];
/// Longest table, in bytes: a pod may have any number of routes.
const LONGEST: usize = 256 * 1024;

/// The namespace at `path`, or with the name `net:[inode]`, as text. A part that cannot be read
/// says why; only a namespace that cannot be entered is an error.
pub async fn describe(path: &Path) -> Result<String, String> {
    let netns = match inode(path) {
        Some(inode) => {
            let all = capture::blocking(garbage::all).await;
            let found = all.into_iter().find(|netns| netns.inode() == inode);
            found.ok_or_else(|| format!("no process is in network namespace {}", path.display()))?
        }
        None => Netns::open(path).map_err(|e| e.to_string())?,
    };
    let mut text = format!("# namespace {}, cookie {}\n", path.display(), netns.cookie());
    match interfaces::list(&netns).await {
        Ok(all) => {
            for i in all {
                let _ = writeln!(text, "interface {} {} (link-layer header: {})", i.index, i.name, i.link_header);
            }
        }
        Err(e) => {
            let _ = writeln!(text, "interfaces: {e}");
        }
    }
    text.push_str(&netns.try_run(here).await.map_err(|e| e.to_string())?);
    Ok(text)
}

/// The number in the name of a namespace that has no path.
fn inode(name: &Path) -> Option<u64> {
    name.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

/// In the namespace of the calling thread.
fn here() -> String {
    let mut text = String::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        match rules(family) {
            Ok(rules) => rules.iter().for_each(|rule| {
                let _ = writeln!(text, "rule {family:?} {rule:?}");
            }),
            Err(e) => {
                let _ = writeln!(text, "rules {family:?}: {e}");
            }
        }
    }
    for setting in SETTINGS {
        let value = fs::read_to_string(Path::new("/proc/sys/net").join(setting));
        let value = value.map_or_else(|e| e.to_string(), |v| v.trim().to_owned());
        let _ = writeln!(text, "net/{setting} = {value}");
    }
    for table in TABLES {
        let _ = writeln!(text, "\n# /proc/thread-self/net/{table}");
        match fs::read_to_string(Path::new("/proc/thread-self/net").join(table)) {
            Ok(mut lines) => {
                if lines.len() > LONGEST {
                    lines.truncate(lines.floor_char_boundary(LONGEST));
                    lines.push_str("\n(cut)\n");
                }
                text.push_str(&lines);
            }
            Err(e) => {
                let _ = writeln!(text, "{e}");
            }
        }
    }
    text
}

fn rules(family: AddressFamily) -> io::Result<Vec<RuleMessage>> {
    let mut request = RuleMessage::default();
    request.header.family = family;
    let answers: Vec<RouteNetlinkMessage> =
        Channel::open(NETLINK_ROUTE)?.dump(&RouteNetlinkMessage::GetRule(request))?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRule(rule) => Some(rule),
            _ => None,
        })
        .collect())
}
