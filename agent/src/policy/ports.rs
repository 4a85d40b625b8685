//! Sets of ports: what all the port fields of a rule come to.

use std::collections::BTreeSet;

use crate::mesh::{Condition, Rule, Values};

/// Ports, or all but some.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PortSet {
    Only(BTreeSet<u16>),
    AllBut(BTreeSet<u16>),
}

impl PortSet {
    /// The ports on which `rule` can match: one of its operations, and every `destination.port` condition.
    pub(super) fn of_rule(rule: &Rule) -> Self {
        let mut ports = if rule.to.is_empty() {
            Self::AllBut(BTreeSet::new())
        } else {
            rule.to.iter().map(|o| Self::of(&o.ports)).fold(Self::Only(BTreeSet::new()), Self::or)
        };
        for condition in &rule.when {
            if let Condition::DestinationPort(values) = condition {
                ports = ports.and(Self::of(values));
            }
        }
        ports
    }

    fn of(values: &Values<u16>) -> Self {
        let none_of: BTreeSet<u16> = values.none_of.iter().copied().collect();
        if values.any_of.is_empty() {
            return Self::AllBut(none_of);
        }
        Self::Only(values.any_of.iter().copied().filter(|p| !none_of.contains(p)).collect())
    }

    fn or(self, other: Self) -> Self {
        self.complement().and(other.complement()).complement()
    }

    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Only(a), Self::Only(b)) => Self::Only(&a & &b),
            (Self::Only(a), Self::AllBut(b)) | (Self::AllBut(b), Self::Only(a)) => Self::Only(&a - &b),
            (Self::AllBut(a), Self::AllBut(b)) => Self::AllBut(&a | &b),
        }
    }

    fn complement(self) -> Self {
        match self {
            Self::Only(ports) => Self::AllBut(ports),
            Self::AllBut(ports) => Self::Only(ports),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::Only(ports) if ports.is_empty())
    }
}
