//! Policies of one action as a table: a row per rule and source, found by all dimensions at once.
//!
//! The rest of a rule fits beside one of its sources, because its operations and conditions look at one dimension each:
//! `(a or b) and c` becomes the rows `a and c`, `b and c`, and never more rows than the policies have sources.

use std::{collections::HashMap, iter::once, sync::Arc};

use ipnet::IpNet;

use super::{
    RuleRef,
    bits::Bits,
    index::{Dimension, DimensionBuilder, LISTS, Nested, Posting, StringIndex},
    matching,
    ports::PortSet,
    request::{SourceAddress, Subject},
};
use crate::mesh::{Action, Condition, Policy, Rule, ServiceAccount, Source, StringMatch, Values, canonical_block};

/// Policies of one action, compiled.
#[derive(Debug)]
pub(super) struct Table {
    policies: Vec<Arc<Policy>>,
    rows: Vec<Row>,
    principals: Dimension<StringIndex>,
    namespaces: Dimension<StringIndex>,
    accounts: Dimension<HashMap<Arc<str>, Posting>>,
    sources: Dimension<Nested<IpNet>>,
    destinations: Dimension<Nested<IpNet>>,
    ports: Dimension<HashMap<u16, Posting>>,
}

/// A source of a rule, with the rest of the rule.
#[derive(Debug)]
struct Row {
    policy: u32,
    rule: u32,
    /// What the dimensions have no room for: third lists of wanted values for one property.
    also: Box<[Condition]>,
}

impl Table {
    /// Compiles policies; the first that matches is the one that is named.
    pub(super) fn new(policies: Vec<Arc<Policy>>) -> Self {
        let mut builder = Builder::default();
        for (p, policy) in policies.iter().enumerate() {
            for (r, rule) in policy.rules.iter().enumerate() {
                if policy.action == Action::Allow && !rule.unsupported.is_empty() {
                    continue;
                }
                builder.rule(p as u32, r as u32, rule);
            }
        }
        builder.build(policies)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// The first rule that matches.
    pub(super) fn first(&self, subject: &Subject<'_>) -> Option<RuleRef> {
        if self.rows.is_empty() {
            return None;
        }
        let alive = self.alive(subject);
        let mut rows = alive.iter().map(|at| &self.rows[at]);
        let row = rows.find(|row| row.also.iter().all(|c| matching::holds(c, subject)))?;
        Some(RuleRef { policy: Arc::clone(&self.policies[row.policy as usize]), rule: row.rule as usize })
    }

    /// The rows that every dimension leaves alive.
    fn alive(&self, subject: &Subject<'_>) -> Bits {
        let mut alive = Bits::ones(self.rows.len());
        let mut scratch = Bits::zeros(self.rows.len());
        let peer = subject.peer.as_ref();
        self.ports.narrow(Some(&subject.port), &mut alive, &mut scratch);
        self.destinations.narrow(Some(&subject.destination), &mut alive, &mut scratch);
        match &subject.source {
            SourceAddress::Is(address) => self.sources.narrow(Some(address), &mut alive, &mut scratch),
            SourceAddress::Some => {}
            SourceAddress::Every => self.sources.narrow_to_untouched(&mut alive),
        }
        if alive.is_empty() {
            return alive;
        }
        self.principals.narrow(peer.map(|p| p.principal.as_str()), &mut alive, &mut scratch);
        self.namespaces.narrow(peer.map(|p| p.identity.namespace()), &mut alive, &mut scratch);
        self.accounts.narrow(peer.map(|p| p.account.as_str()), &mut alive, &mut scratch);
        alive
    }
}

#[derive(Default)]
struct Builder {
    rows: Vec<Row>,
    principals: DimensionBuilder<StringMatch>,
    namespaces: DimensionBuilder<StringMatch>,
    accounts: DimensionBuilder<Arc<str>>,
    sources: DimensionBuilder<IpNet>,
    destinations: DimensionBuilder<IpNet>,
    ports: DimensionBuilder<u16>,
}

impl Builder {
    fn rule(&mut self, policy: u32, index: u32, rule: &Rule) {
        let ports = PortSet::of_rule(rule);
        if ports.is_empty() {
            return;
        }
        if rule.from.is_empty() {
            self.row(policy, index, &Source::default(), &rule.when, &ports);
        }
        for source in &rule.from {
            self.row(policy, index, source, &rule.when, &ports);
        }
    }

    fn row(&mut self, policy: u32, rule: u32, source: &Source, when: &[Condition], ports: &PortSet) {
        let row = self.rows.len() as u32;
        let mut also = Vec::new();

        let more = when.iter().filter_map(|c| if let Condition::SourcePrincipal(v) = c { Some(v) } else { None });
        let rest = enter(&mut self.principals, row, once(&source.principals).chain(more), StringMatch::clone);
        also.extend(rest.into_iter().map(Condition::SourcePrincipal));

        let more = when.iter().filter_map(|c| if let Condition::SourceNamespace(v) = c { Some(v) } else { None });
        let rest = enter(&mut self.namespaces, row, once(&source.namespaces).chain(more), StringMatch::clone);
        also.extend(rest.into_iter().map(Condition::SourceNamespace));

        // The order of the index relies on it, whatever the source of the policy did.
        let block = |b: &IpNet| canonical_block(*b);
        let account = |a: &ServiceAccount| Arc::from([&*a.namespace, "/", &*a.name].concat());
        let more = when.iter().filter_map(|c| if let Condition::SourceServiceAccount(v) = c { Some(v) } else { None });
        let rest = enter(&mut self.accounts, row, once(&source.service_accounts).chain(more), account);
        also.extend(rest.into_iter().map(Condition::SourceServiceAccount));

        let more = when.iter().filter_map(|c| if let Condition::SourceIp(v) = c { Some(v) } else { None });
        let rest = enter(&mut self.sources, row, once(&source.ip_blocks).chain(more), block);
        also.extend(rest.into_iter().map(Condition::SourceIp));

        let more = when.iter().filter_map(|c| if let Condition::DestinationIp(v) = c { Some(v) } else { None });
        let rest = enter(&mut self.destinations, row, more, block);
        also.extend(rest.into_iter().map(Condition::DestinationIp));

        match ports {
            PortSet::Only(ports) => ports.iter().for_each(|p| self.ports.want(0, row, *p)),
            PortSet::AllBut(ports) => ports.iter().for_each(|p| self.ports.exclude(row, *p)),
        }
        self.rows.push(Row { policy, rule, also: also.into() });
    }

    fn build(self, policies: Vec<Arc<Policy>>) -> Table {
        let width = self.rows.len();
        Table {
            policies,
            rows: self.rows,
            principals: self.principals.build(width),
            namespaces: self.namespaces.build(width),
            accounts: self.accounts.build(width),
            sources: self.sources.build(width),
            destinations: self.destinations.build(width),
            ports: self.ports.build(width),
        }
    }
}

/// Enters what a row wants and excludes. A dimension has room for [`LISTS`] lists of wanted values per row; further ones
/// are returned. Excluded values add up.
fn enter<'a, T: Clone + 'a, P: Ord>(
    dimension: &mut DimensionBuilder<P>,
    row: u32,
    constraints: impl Iterator<Item = &'a Values<T>>,
    pattern: impl Fn(&T) -> P,
) -> Vec<Values<T>> {
    let mut rest = Vec::new();
    let mut lists = 0;
    for Values { any_of, none_of } in constraints {
        for value in none_of {
            dimension.exclude(row, pattern(value));
        }
        if any_of.is_empty() {
            continue;
        }
        if lists == LISTS {
            rest.push(Values { any_of: any_of.clone(), none_of: Vec::new() });
            continue;
        }
        for value in any_of {
            dimension.want(lists, row, pattern(value));
        }
        lists += 1;
    }
    rest
}
