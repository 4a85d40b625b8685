//! How much of `PORT_RULES` and `EXCLUDED_CIDRS` a pod may use, and what becomes of rules that do not fit. No I/O.
//!
//! A pod's rules come from its owner: a pod that needs more than its share must not take the room of another pod, nor keep
//! its own old rules in force. What does not fit is left out, and leaving out is always the stricter choice.

use std::{collections::BTreeMap, fmt};

use underpass_abi::{
    DIRECTION_INBOUND, DIRECTION_OUTBOUND, DIRECTION_PROBE, POD_ASSIGN, POD_OWN_RULES_ONLY, POD_STRICT, PORT_ASSIGN,
    PORT_PERMISSIVE, PORT_STRICT, capacity,
};

use super::desired::{PodState, PortSlot, Rules};

/// How many entries fit into each of the two maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Into `PORT_RULES`.
    pub ports: usize,
    /// Into `EXCLUDED_CIDRS`.
    pub cidrs: usize,
}

impl Room {
    /// For what holds for all pods.
    pub const ALL_PODS: Self = Self { ports: capacity::RULES_FOR_ALL_PODS, cidrs: capacity::RULES_FOR_ALL_PODS };
}

/// The room in one of the maps for a pod that has `own` entries there, when all other pods together have `others`. What a pod
/// has it keeps, so that a change elsewhere takes nothing from it.
pub fn for_pod(own: usize, others: usize) -> usize {
    capacity::RULES_IN_COMMON
        .saturating_sub(others)
        .max(own)
        .clamp(capacity::RULES_PER_POD_SURE, capacity::RULES_PER_POD_MOST)
}

/// Entries that do not fit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overflow {
    /// Port rules: needed and kept.
    ports: Option<(usize, usize)>,
    /// Excluded networks: needed and kept.
    cidrs: Option<(usize, usize)>,
}

impl Overflow {
    /// Does everything fit?
    pub fn is_none(self) -> bool {
        self == Self::default()
    }

    /// What that means for a pod, and what to do.
    pub fn of_pod(self) -> impl fmt::Display {
        fmt::from_fn(move |f| {
            let mut and = "";
            if let Some((needed, kept)) = self.ports {
                write!(
                    f,
                    "{needed} port rules are more than fit ({kept} are in force): the pod is STRICT on every other port, \
                     and no other port is excluded; take out excluded ports or port-level modes"
                )?;
                and = "; ";
            }
            if let Some((needed, kept)) = self.cidrs {
                write!(
                    f,
                    "{and}{needed} excluded networks are more than fit ({kept} are in force): connections to the others \
                     are captured; exclude fewer and larger networks"
                )?;
            }
            Ok(())
        })
    }

    /// What that means for the mesh, and what to do.
    pub fn of_mesh(self) -> impl fmt::Display {
        fmt::from_fn(move |f| {
            let mut and = "";
            if let Some((needed, kept)) = self.ports {
                write!(
                    f,
                    "{needed} mesh-wide excluded ports are more than fit: {kept} are in force, the others are not excluded; \
                     exclude fewer ports"
                )?;
                and = "; ";
            }
            if let Some((needed, kept)) = self.cidrs {
                write!(
                    f,
                    "{and}{needed} mesh-wide excluded networks are more than fit: {kept} are in force, the others are \
                     captured; exclude fewer and larger networks"
                )?;
            }
            Ok(())
        })
    }
}

impl PodState {
    /// Leaves out what does not fit. Without room for all port rules the pod becomes STRICT, also on ports that are excluded
    /// for all pods, and keeps the rules that fit: first those that hand plaintext to the agent, last exclusions.
    #[must_use]
    pub fn fit(mut self, room: Room) -> (Self, Overflow) {
        let mut overflow = Overflow { ports: None, cidrs: keep_first(&mut self.rules.excluded, room.cidrs) };
        let needed = self.rules.ports.len();
        if needed > room.ports {
            self.config.flags = self.config.flags & !POD_ASSIGN | POD_STRICT | POD_OWN_RULES_ONLY;
            let mut kept: Vec<_> = std::mem::take(&mut self.rules.ports).into_iter().collect();
            // STRICT is what the pod is anyway.
            kept.retain(|(slot, rule)| slot.direction != DIRECTION_INBOUND || rule.action != PORT_STRICT);
            kept.sort_by_key(|(slot, rule)| (order(*slot, rule.action), *slot));
            kept.truncate(room.ports);
            overflow.ports = Some((needed, kept.len()));
            self.rules.ports = kept.into_iter().collect();
        }
        (self, overflow)
    }
}

/// Which rules are kept first.
fn order(slot: PortSlot, action: u32) -> u8 {
    match (slot.direction, action) {
        (DIRECTION_INBOUND, PORT_ASSIGN) => 0,
        (DIRECTION_PROBE, _) => 1,
        (DIRECTION_INBOUND, PORT_PERMISSIVE) => 2,
        (DIRECTION_OUTBOUND, _) => 4,
        _ => 3,
    }
}

impl Rules {
    /// Leaves out what does not fit of the rules for all pods, which are exclusions only.
    #[must_use]
    pub fn fit_all_pods(mut self) -> (Self, Overflow) {
        let Room { ports, cidrs } = Room::ALL_PODS;
        let overflow =
            Overflow { ports: keep_first(&mut self.ports, ports), cidrs: keep_first(&mut self.excluded, cidrs) };
        (self, overflow)
    }
}

/// Keeps so many of the entries; says how many there were and are when that is fewer.
pub fn keep_first<K: Ord + Copy, V>(entries: &mut BTreeMap<K, V>, room: usize) -> Option<(usize, usize)> {
    let needed = entries.len();
    let first_too_many = *entries.keys().nth(room)?;
    drop(entries.split_off(&first_too_many));
    Some((needed, room))
}

#[cfg(test)]
#[path = "tests/room.rs"]
mod tests;
