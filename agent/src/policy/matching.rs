//! Rules read literally: for what the tables leave over, and to say why a rule does or does not match.

use std::fmt::Write as _;

use ipnet::IpNet;

use super::request::{SourceAddress, Subject};
use crate::mesh::{Action, Condition, Policy, Rule, ServiceAccount, Source, StringMatch, Values};

/// Sources, operations or conditions named in one explanation.
const NAMED: usize = 4;

/// Does a condition hold?
pub(super) fn holds(condition: &Condition, subject: &Subject<'_>) -> bool {
    match condition {
        Condition::SourceIp(values) => source_ip(values, subject),
        Condition::SourceNamespace(values) => namespace(values, subject),
        Condition::SourcePrincipal(values) => principal(values, subject),
        Condition::SourceServiceAccount(values) => account(values, subject),
        Condition::DestinationIp(values) => values.hold(|block| block.contains(&subject.destination)),
        Condition::DestinationPort(values) => values.hold(|port| *port == subject.port),
    }
}

fn principal(values: &Values<StringMatch>, subject: &Subject<'_>) -> bool {
    values.hold(|v| subject.peer.as_ref().is_some_and(|p| v.matches(&p.principal)))
}

fn namespace(values: &Values<StringMatch>, subject: &Subject<'_>) -> bool {
    values.hold(|v| subject.peer.as_ref().is_some_and(|p| v.matches(p.identity.namespace())))
}

fn account(values: &Values<ServiceAccount>, subject: &Subject<'_>) -> bool {
    values.hold(|v| subject.peer.as_ref().is_some_and(|p| v.matches(p.identity)))
}

fn source_ip(values: &Values<IpNet>, subject: &Subject<'_>) -> bool {
    match subject.source {
        SourceAddress::Is(address) => values.hold(|block| block.contains(&address)),
        SourceAddress::Some => true,
        SourceAddress::Every => values.is_unset(),
    }
}

/// Why a rule matches (`Ok`) or does not, in terms of the fields that were written.
pub(super) fn outcome(policy: &Policy, rule: &Rule, subject: &Subject<'_>) -> Result<String, String> {
    if policy.action == Action::Allow && !rule.unsupported.is_empty() {
        let fields: Vec<&str> = rule.unsupported.iter().take(NAMED).map(|f| &**f).collect();
        return Err(format!("{} cannot be known of a TCP connection, so it never allows", fields.join(", ")));
    }
    let mut because = Vec::new();
    if let Some(found) = one_of("from", &rule.from, |source| failing_source(source, subject))? {
        because.push(found);
    }
    let failing_operation = |o: &crate::mesh::Operation| {
        failing(&o.ports, ["operation.ports", "operation.notPorts"], |v| v.hold(|p| *p == subject.port))
    };
    if let Some(found) = one_of("to", &rule.to, failing_operation)? {
        because.push(found);
    }
    for (i, condition) in rule.when.iter().enumerate() {
        if !holds(condition, subject) {
            return Err(format!("when[{i}] ({}) does not hold", condition.key()));
        }
    }
    if !rule.when.is_empty() {
        because.push("every condition holds".to_owned());
    }
    if because.is_empty() {
        because.push("it has no conditions".to_owned());
    }
    Ok(because.join(", "))
}

/// `Ok(None)` for an empty list, which matches anything.
fn one_of<T>(
    list: &str,
    entries: &[T],
    failing: impl Fn(&T) -> Option<&'static str>,
) -> Result<Option<String>, String> {
    let mut failed = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        match failing(entry) {
            None => return Ok(Some(format!("{list}[{i}] matches"))),
            Some(field) => failed.push((i, field)),
        }
    }
    if failed.is_empty() {
        return Ok(None);
    }
    let mut text = String::new();
    for (n, (i, field)) in failed.iter().take(NAMED).enumerate() {
        let separator = if n == 0 { "" } else { ", " };
        let _ = write!(text, "{separator}{list}[{i}].{field}");
    }
    if failed.len() > NAMED {
        let _ = write!(text, " and {} more", failed.len() - NAMED);
    }
    text.push_str(if failed.len() == 1 { " does not match" } else { " do not match" });
    Err(text)
}

/// The first field of a source that does not hold.
fn failing_source(source: &Source, subject: &Subject<'_>) -> Option<&'static str> {
    failing(&source.principals, ["source.principals", "source.notPrincipals"], |v| principal(v, subject))
        .or_else(|| {
            failing(&source.namespaces, ["source.namespaces", "source.notNamespaces"], |v| namespace(v, subject))
        })
        .or_else(|| {
            let names = ["source.serviceAccounts", "source.notServiceAccounts"];
            failing(&source.service_accounts, names, |v| account(v, subject))
        })
        .or_else(|| failing(&source.ip_blocks, ["source.ipBlocks", "source.notIpBlocks"], |v| source_ip(v, subject)))
}

/// Which half of a field does not hold.
fn failing<T: Clone>(
    values: &Values<T>,
    [wanted, excluded]: [&'static str; 2],
    hold: impl Fn(&Values<T>) -> bool,
) -> Option<&'static str> {
    if hold(values) {
        return None;
    }
    let only_excluded = Values { any_of: Vec::new(), none_of: values.none_of.clone() };
    Some(if hold(&only_excluded) { wanted } else { excluded })
}
