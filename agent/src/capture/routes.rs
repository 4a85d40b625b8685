//! The way back for connections that the agent makes to applications from a client's address.
//!
//! Such a socket is bound to an address that is not the pod's, so the application's answers would leave through the
//! default route. Three settings keep them inside, without iptables: the agent's packets carry [`AGENT_MARK`]; an accepted
//! socket takes the mark over from the SYN (`tcp_fwmark_accept`), as do resets of closed ports (`fwmark_reflect`); and a
//! rule sends what carries the mark to a table where every address is local. The mark routes, it authorises nothing.
//!
//! Rule and route carry a protocol number of their own, so that what somebody else put into the same table stays.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    link::{LinkFlags, LinkMessage},
    route::{RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use tracing::{debug, warn};
use underpass_abi::AGENT_MARK;

use super::{
    EnrollError,
    netns::{Netns, has_ipv6_here, netlink::Channel},
};
use crate::sys::contained;

/// Routing table in the pod's namespace that holds nothing but a local default route.
pub const TABLE: u8 = 100;
/// Priority of the rule: after the local table (0), before anything that an administrator or `ip rule` puts ahead of the main
/// table (32766).
pub const PRIORITY: u32 = 100;
/// Owner of rule and route (`RTA_PROTOCOL`, `FRA_PROTOCOL`). Numbers from 5 on that nobody registered are free (`rtnetlink.h`).
pub const PROTOCOL: u8 = 117;
/// Loopback has index 1 in every namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
/// The settings under `/proc/sys/net`; `tcp_fwmark_accept` is for both families.
const SYSCTLS_V4: [&str; 2] = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect"];
const SYSCTLS_V6: [&str; 1] = ["ipv6/fwmark_reflect"];

/// Who needs the way back in each namespace, by cookie. Connections of an un-enrolled pod live on while the same namespace may
/// be enrolled again, so the last to leave removes it. Held while a namespace is changed, which orders the changes.
static INSTALLED: Mutex<BTreeMap<u64, Installed>> = Mutex::new(BTreeMap::new());

/// Another agent keeps the ways back now.
static LEFT: AtomicBool = AtomicBool::new(false);

/// From now on no way back is removed by this process: another agent needs them.
pub(super) fn leave_all() {
    LEFT.store(true, Relaxed);
}

/// What has to be undone in a namespace.
struct Installed {
    /// Where.
    netns: Netns,
    users: usize,
    /// Settings with the value they had before.
    sysctls: Vec<(&'static str, String)>,
}

/// Puts the way back into the namespace. Every success asks for one [`remove`].
pub async fn install(netns: &Netns) -> Result<(), EnrollError> {
    let here = netns.clone();
    netns
        .try_run(move || install_here(here))
        .await
        .map_err(|error| setup("enter the namespace for the reply route", &error))?
}

/// Takes it out again when nobody else needs it; also what an earlier agent left. Nothing to remove is no error.
pub async fn remove(netns: &Netns) {
    let (cookie, path) = (netns.cookie(), netns.path().to_owned());
    if let Err(error) = netns.try_run(move || remove_here(cookie, &path)).await {
        warn!(netns = %netns.path().display(), %error, "reply route not removed");
    }
}

/// [`remove`] without waiting for it.
pub(super) fn remove_detached(netns: &Netns) {
    let (cookie, path) = (netns.cookie(), netns.path().to_owned());
    netns.detach(move |entered| match entered {
        Ok(()) => remove_here(cookie, &path),
        Err(error) => warn!(netns = %path.display(), %error, "reply route not removed"),
    });
}

/// Brings loopback up in the namespace of the calling thread; `::1` exists only then.
pub(super) fn loopback_up_here() -> Result<(), EnrollError> {
    let mut link = LinkMessage::default();
    link.header.index = LOOPBACK;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    Channel::open(NETLINK_ROUTE)
        .and_then(|mut channel| channel.change(RouteNetlinkMessage::SetLink(link), 0))
        .map_err(|error| setup("bring loopback up", &error))
}

/// Takes every way back out that this process has put in, whoever still needs it: for an agent that ends and leaves nothing.
pub(super) async fn remove_all() {
    let all: Vec<Netns> = {
        let all = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        all.values().map(|installed| installed.netns.clone()).collect()
    };
    for netns in all {
        let cookie = netns.cookie();
        let work = move || {
            let mut all = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(installed) = all.remove(&cookie) {
                take(&installed.sysctls);
            }
        };
        if let Err(error) = netns.try_run(work).await {
            warn!(netns = %netns.path().display(), %error, "reply route not removed");
        }
    }
}

fn install_here(netns: Netns) -> Result<(), EnrollError> {
    let cookie = netns.cookie();
    let mut all = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(installed) = all.get_mut(&cookie) {
        installed.users += 1;
        return Ok(());
    }
    let mut sysctls = Vec::new();
    match put(&mut sysctls) {
        Ok(()) => {
            all.insert(cookie, Installed { netns, users: 1, sysctls });
            Ok(())
        }
        Err(error) => {
            take(&sysctls);
            Err(error)
        }
    }
}

/// `sysctls` gets the settings that were made, with the value they had before.
fn put(sysctls: &mut Vec<(&'static str, String)>) -> Result<(), EnrollError> {
    loopback_up_here()?;
    let mut channel = Channel::open(NETLINK_ROUTE).map_err(|error| setup("open a netlink socket", &error))?;
    let mut adopted = false;
    for family in families() {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        let route = created(channel.change(RouteNetlinkMessage::NewRoute(route(family)), flags));
        route.map_err(|error| setup("add local default route to table 100", &error))?;
        let rule = created(channel.change(RouteNetlinkMessage::NewRule(rule(family)), flags));
        adopted |= !rule.map_err(|error| setup("add rule: fwmark 0x539 lookup 100", &error))?;
    }
    let v6: &[_] = if has_ipv6_here() { &SYSCTLS_V6 } else { &[] };
    for name in SYSCTLS_V4.iter().chain(v6) {
        let old = write_sysctl(name, "1").map_err(|error| {
            setup("set net.ipv4.tcp_fwmark_accept and fwmark_reflect (is /proc/sys writable here, or CAP_SYS_ADMIN there?)", &error)
        })?;
        // A rule of ours that is already there means that an earlier agent also set these; 0 is the kernel's default.
        sysctls.push((name, if adopted { "0".to_owned() } else { old }));
    }
    Ok(())
}

fn remove_here(cookie: u64, path: &Path) {
    if LEFT.load(Relaxed) {
        return;
    }
    let mut all = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(installed) = all.get_mut(&cookie)
        && installed.users > 1
    {
        installed.users -= 1;
        return;
    }
    debug!(netns = %path.display(), "removing the reply route");
    let removed = all.remove(&cookie);
    take(removed.as_ref().map_or(&[], |installed| &installed.sysctls));
}

/// Undoes as much as there is. Failures are logged: there is nobody to act on them.
fn take(sysctls: &[(&'static str, String)]) {
    let mut found = false;
    match Channel::open(NETLINK_ROUTE) {
        Ok(mut channel) => {
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                for request in
                    [RouteNetlinkMessage::DelRule(rule(family)), RouteNetlinkMessage::DelRoute(route(family))]
                {
                    match channel.change(request, 0) {
                        Ok(()) => found = true,
                        Err(error) if is_absence(&error) => {}
                        Err(error) => warn!(%error, ?family, "reply rule or route not removed"),
                    }
                }
            }
        }
        Err(error) => warn!(%error, "reply route not removed: no netlink socket"),
    }
    // What an earlier agent installed was not recorded here; its settings go back to the kernel's default.
    let sysctls: Vec<_> = if sysctls.is_empty() && found {
        SYSCTLS_V4.iter().chain(&SYSCTLS_V6).map(|name| (*name, "0")).collect()
    } else {
        sysctls.iter().map(|(name, old)| (*name, old.as_str())).collect()
    };
    for (name, old) in sysctls {
        match write_sysctl(name, old) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => warn!(%error, name, value = old, "setting not restored"),
        }
    }
}

fn families() -> Vec<AddressFamily> {
    let mut families = vec![AddressFamily::Inet];
    if has_ipv6_here() {
        families.push(AddressFamily::Inet6);
    } else {
        debug!("the namespace has no IPv6: no reply route for it");
    }
    families
}

/// `ip rule add fwmark 0x539 lookup 100`
fn rule(family: AddressFamily) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.table = TABLE;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(AGENT_MARK),
        RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    rule
}

/// `ip route add local default dev lo table 100`
fn route(family: AddressFamily) -> RouteMessage {
    fn complete<T>(builder: RouteMessageBuilder<T>) -> RouteMessage {
        builder
            .table_id(TABLE.into())
            .output_interface(LOOPBACK)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .protocol(RouteProtocol::Other(PROTOCOL))
            .build()
    }
    if family == AddressFamily::Inet6 {
        complete(RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::UNSPECIFIED, 0))
    } else {
        complete(RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::UNSPECIFIED, 0))
    }
}

/// True when it was created, false when it was there.
fn created(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}

/// Sets a value in the namespace of the calling thread (`/proc/sys/net` is that of the thread) and returns the one before.
fn write_sysctl(name: &str, value: &str) -> io::Result<String> {
    let path = Path::new("/proc/sys/net").join(name);
    let old = fs::read_to_string(&path)?.trim().to_owned();
    if old != value {
        contained::write_setting(&path, value)?;
    }
    Ok(old)
}

fn setup(action: &'static str, error: &io::Error) -> EnrollError {
    EnrollError::Setup { action, reason: error.to_string() }
}

#[cfg(test)]
#[path = "netns_tests/routes.rs"]
mod tests;
