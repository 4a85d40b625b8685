use std::collections::BTreeMap;

use proptest::prelude::*;
use underpass_abi::{
    DIRECTION_INBOUND, DIRECTION_OUTBOUND, DIRECTION_PROBE, PORT_EXCLUDED, PORT_PERMISSIVE, PORT_PROBE, PodConfig,
    PortRule, capacity,
};

use super::{
    super::desired::{ALL_PODS, Strictness, excluded_prefix},
    *,
};

const POD: u32 = 3;

fn slot(pod_id: u32, direction: u16, port: u16) -> PortSlot {
    PortSlot { pod_id, direction, port }
}

fn state(flags: u32, ports: &[(u16, u16, u32)]) -> PodState {
    let ports =
        ports.iter().map(|(direction, port, action)| (slot(POD, *direction, *port), PortRule { action: *action }));
    PodState {
        config: PodConfig { pod_id: POD, flags, ..PodConfig::default() },
        rules: Rules { ports: ports.collect(), excluded: BTreeMap::new() },
    }
}

#[test]
fn what_fits_stays_as_it_is() {
    let wanted = state(POD_ASSIGN, &[(DIRECTION_INBOUND, 80, PORT_STRICT), (DIRECTION_OUTBOUND, 25, PORT_EXCLUDED)]);
    let (fitted, overflow) = wanted.clone().fit(Room { ports: 2, cidrs: 0 });
    assert_eq!(fitted, wanted);
    assert!(overflow.is_none());
}

#[test]
fn a_pod_with_too_many_port_rules_becomes_strict_and_keeps_the_least_open_ones() {
    let wanted = state(
        POD_ASSIGN,
        &[
            (DIRECTION_OUTBOUND, 25, PORT_EXCLUDED),
            (DIRECTION_INBOUND, 80, PORT_PERMISSIVE),
            (DIRECTION_INBOUND, 81, PORT_STRICT),
            (DIRECTION_INBOUND, 82, PORT_ASSIGN),
            (DIRECTION_INBOUND, 83, PORT_EXCLUDED),
            (DIRECTION_PROBE, 84, PORT_PROBE),
        ],
    );
    let (fitted, overflow) = wanted.fit(Room { ports: 3, cidrs: 0 });
    assert_eq!(fitted.config.flags, POD_STRICT | POD_OWN_RULES_ONLY);
    let kept: Vec<_> = fitted.rules.ports.keys().map(|slot| slot.port).collect();
    assert_eq!(kept, [80, 82, 84]);
    let text = overflow.of_pod().to_string();
    assert!(text.contains("6 port rules") && text.contains("(3 are in force)") && text.contains("STRICT"), "{text}");
}

#[test]
fn networks_that_do_not_fit_are_captured() {
    let mut wanted = state(0, &[]);
    let nets = ["10.1.0.0/16", "10.2.0.0/16", "10.3.0.0/16"];
    wanted.rules.excluded = nets.map(|net| (excluded_prefix(POD, net.parse().unwrap()), 1)).into();
    let (fitted, overflow) = wanted.fit(Room { ports: 0, cidrs: 2 });
    assert_eq!((fitted.rules.excluded.len(), fitted.config.flags), (2, 0));
    assert!(overflow.of_pod().to_string().contains("3 excluded networks"), "{}", overflow.of_pod());
}

#[test]
fn mesh_wide_exclusions_have_a_room_of_their_own() {
    let ports =
        (1..=u16::MAX).map(|port| (slot(ALL_PODS, DIRECTION_OUTBOUND, port), PortRule { action: PORT_EXCLUDED }));
    let (kept, overflow) = Rules { ports: ports.collect(), excluded: BTreeMap::new() }.fit_all_pods();
    assert_eq!(kept.ports.len(), capacity::RULES_FOR_ALL_PODS);
    assert!(overflow.of_mesh().to_string().contains("65535 mesh-wide excluded ports"), "{}", overflow.of_mesh());
}

#[test]
fn greedy_pods_leave_every_other_pod_what_it_is_sure_to_have() {
    // Every pod of the fullest possible node wants all that it can get, one after the other.
    let mut all = 0;
    for _ in 0..capacity::PODS {
        let room = for_pod(0, all);
        assert!(room >= capacity::RULES_PER_POD_SURE);
        assert!(room <= capacity::RULES_PER_POD_MOST);
        all += room;
    }
    assert!(all + capacity::RULES_FOR_ALL_PODS <= capacity::PORT_RULES, "{all}");
    assert_eq!(for_pod(300, all - 300), 300, "a pod keeps what it has");
    assert_eq!(for_pod(5000, 0), capacity::RULES_PER_POD_MOST);
}

proptest! {
    /// Leaving out never opens a port that was closed, also not through a rule for all pods.
    #[test]
    fn what_does_not_fit_is_stricter(
        flags in prop_oneof![Just(0), Just(POD_ASSIGN), Just(POD_STRICT)],
        own in proptest::collection::btree_map(1u16..20, prop_oneof![
            Just(PORT_PERMISSIVE), Just(PORT_STRICT), Just(PORT_ASSIGN), Just(PORT_EXCLUDED)
        ], 0..20),
        everyone in proptest::collection::btree_set(1u16..20, 0..10),
        room in 0usize..20,
    ) {
        let ports: Vec<_> = own.iter().map(|(port, action)| (DIRECTION_INBOUND, *port, *action)).collect();
        let wanted = state(flags, &ports);
        let excluded = everyone.iter().map(|port| (slot(ALL_PODS, DIRECTION_INBOUND, *port), PortRule { action: PORT_EXCLUDED }));
        let all = Rules { ports: excluded.collect(), excluded: BTreeMap::new() };
        let (fitted, overflow) = wanted.clone().fit(Room { ports: room, cidrs: 0 });
        prop_assert_eq!(overflow.is_none(), own.len() <= room);
        prop_assert!(fitted.rules.ports.len() <= room);
        let strictness = |state: &PodState| Strictness::new(&state.config, &state.rules, &all);
        prop_assert!(!strictness(&wanted).tightens(&strictness(&fitted)), "{wanted:?} became {fitted:?}");
    }
}
