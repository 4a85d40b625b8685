//! Which pod has most of the maps that all pods share.

use underpass_abi::capacity;

use super::maps::Maps;

/// The fullest pod in a map that pods share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Name of the map.
    pub map: &'static str,
    /// The pod with most entries, by number, and its entries; `None` when no pod has any.
    pub fullest: Option<(u32, u64)>,
    /// How many entries a pod may have now.
    pub limit: u64,
}

/// Of all such maps.
pub fn of(maps: &Maps) -> Vec<Share> {
    let flows = Share { map: "FLOWS", fullest: maps.flows.fullest().1, limit: maps.flows.share() };
    let tables = maps.tables();
    let limit = capacity::RULES_PER_POD_MOST as u64;
    let ports = Share { map: "PORT_RULES", fullest: fullest(tables.port_owners()), limit };
    let cidrs = Share { map: "EXCLUDED_CIDRS", fullest: fullest(tables.cidr_owners()), limit };
    vec![flows, ports, cidrs]
}

/// The owner that comes most often. Entries of one owner are neighbours, as the tables have them.
fn fullest(owners: impl Iterator<Item = u32>) -> Option<(u32, u64)> {
    let mut most = None;
    let mut current = (0, 0);
    for owner in owners {
        current = if owner == current.0 { (owner, current.1 + 1) } else { (owner, 1) };
        if owner != 0 && most.is_none_or(|(_, entries)| current.1 > entries) {
            most = Some(current);
        }
    }
    most
}
