//! Starting, starting again, and the maps.

use std::{fs, io::ErrorKind};

use aya::maps::{HashMap, LpmTrie, MapData, lpm_trie::Key};
use underpass_abi::{MESH_CAPTURE, MeshEntry, PORT_EXCLUDED, PortKey, PortRule, capacity};

use super::{
    super::{Capture, CaptureOptions, desired::address, loader::HOOKS, pins::Layout},
    lab::{Lab, snapshot},
    workload,
};
use crate::{
    mesh::{Exclusions, MeshSettings},
    sys::bpf::LinkTarget,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_replaces_programs_and_keeps_links() {
    let lab = Lab::new();
    let capture = lab.start().await;
    let before = lab.links();
    assert_eq!(before.len(), HOOKS.len());
    let error = Capture::start(lab.options()).await.err().expect("one agent per pin directory").to_string();
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    assert_eq!(lab.links(), before, "who is refused touches nothing");
    drop(capture);
    assert_eq!(lab.links(), before, "an agent that goes leaves capture in place");

    let _capture = lab.start().await;
    let after = lab.links();
    for (hook, _) in HOOKS {
        let (before, after) = (before[hook], after[hook]);
        assert_eq!((before.id, before.target), (after.id, after.target), "{hook}");
        assert_ne!(before.program_id, after.program_id, "{hook}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cgroup_takes_over() {
    let lab = Lab::new();
    drop(lab.start().await);
    let before = lab.links();
    let other = lab.cgroup.join("other");
    fs::create_dir(&other).unwrap();
    let _capture = Capture::start(CaptureOptions { cgroup: other, ..lab.options() }).await.unwrap();
    let after = lab.links();
    assert_eq!(after.len(), HOOKS.len(), "nothing of the replacement is left");
    for (hook, _) in HOOKS {
        assert_ne!(before[hook].target, after[hook].target, "{hook}");
        assert!(matches!(after[hook].target, LinkTarget::Cgroup(id) if id != 0));
        assert!(!link_exists(before[hook].id), "{hook}: the old link is gone");
    }
}

fn link_exists(id: u32) -> bool {
    aya::programs::loaded_links().filter_map(Result::ok).any(|l| l.id() == id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cgroup_that_was_made_anew_is_attached_to() {
    let lab = Lab::new();
    let other = lab.cgroup.join("other");
    let options = CaptureOptions { cgroup: other.clone(), ..lab.options() };
    fs::create_dir(&other).unwrap();
    drop(Capture::start(options.clone()).await.unwrap());
    fs::remove_dir(&other).unwrap();
    fs::create_dir(&other).unwrap();
    let _capture = Capture::start(options).await.unwrap();
    assert!(lab.links().values().all(|l| matches!(l.target, LinkTarget::Cgroup(id) if id != 0)), "{:?}", lab.links());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_leaves_nothing_of_its_own() {
    let lab = Lab::new();
    let elsewhere = CaptureOptions { cgroup: "/run".into(), ..lab.options() };
    let error = Capture::start(elsewhere).await.err().expect("/run is no cgroup").to_string();
    assert!(error.contains("/run"), "{error}");
    assert_eq!(fs::read_dir(&lab.pins).err().map(|e| e.kind()), Some(ErrorKind::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn maps_of_another_size_are_not_adopted() {
    let lab = Lab::new();
    drop(lab.start().await);
    let layout = lab.layout();
    // Another map under a name this agent uses.
    fs::remove_file(layout.map("PODS")).unwrap();
    MapData::from_pin(layout.map("PODS_BY_ID")).unwrap().pin(layout.map("PODS")).unwrap();
    let before = lab.links();
    let error = Capture::start(lab.options()).await.err().expect("a wrong map").to_string();
    assert!(error.contains("PODS") && error.contains("cleanup"), "{error}");
    assert_eq!(lab.links(), before, "what was captured stays captured");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_projected_and_the_next_one_replaces_it() {
    let lab = Lab::new();
    let capture = lab.start().await;
    let exclude = Exclusions {
        outbound_ports: vec![53],
        outbound_cidrs: vec!["10.0.9.0/24".parse().unwrap()],
        inbound_ports: vec![],
    };
    let settings = MeshSettings { cidrs: vec!["10.0.0.0/16".parse().unwrap()], exclude, ..MeshSettings::default() };
    capture
        .apply(&snapshot(settings, vec![workload("a", "192.0.2.1", None), workload("b", "192.0.2.2", None)]))
        .unwrap();

    let mesh: LpmTrie<_, [u8; 16], MeshEntry> = open(&lab.layout(), "MESH");
    let ports: HashMap<_, PortKey, PortRule> = open(&lab.layout(), "PORT_RULES");
    let excluded: LpmTrie<_, [u8; 20], u32> = open(&lab.layout(), "EXCLUDED_CIDRS");
    let captured =
        |ip: &str| mesh.get(&Key::new(128, address(ip.parse().unwrap())), 0).is_ok_and(|e| e.flags == MESH_CAPTURE);
    for (ip, expected) in [("192.0.2.1", true), ("192.0.2.2", true), ("192.0.2.3", false), ("10.0.200.1", true)] {
        assert_eq!(captured(ip), expected, "{ip}");
    }
    let dns = PortKey { pod_id: 0, port: 53, direction: 0 };
    assert_eq!(ports.get(&dns, 0).unwrap().action, PORT_EXCLUDED);
    assert_eq!(excluded.keys().count(), 1);
    let mut inside = [0; 20];
    inside[4..].copy_from_slice(&address("10.0.9.77".parse().unwrap()));
    assert!(excluded.get(&Key::new(160, inside), 0).is_ok());

    // A restarted agent knows what is there and removes what is not wanted any more.
    drop(capture);
    let capture = lab.start().await;
    assert!(captured("192.0.2.1"), "kept until a configuration says otherwise");
    capture.apply(&snapshot(MeshSettings::default(), vec![workload("b", "192.0.2.2", None)])).unwrap();
    for (ip, expected) in [("192.0.2.1", false), ("192.0.2.2", true), ("10.0.200.1", false)] {
        assert_eq!(captured(ip), expected, "{ip}");
    }
    assert_eq!(mesh.keys().count(), 1);
    assert_eq!((ports.keys().count(), excluded.keys().count()), (0, 0));
}

fn open<T>(layout: &Layout, name: &str) -> T
where
    T: TryFrom<aya::maps::Map, Error = aya::maps::MapError>,
{
    let data = MapData::from_pin(layout.map(name)).unwrap();
    T::try_from(aya::maps::Map::from_map_data(data).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_exclusions_are_left_out_and_the_rest_is_applied() {
    let lab = Lab::new();
    let capture = lab.start().await;
    let ports: HashMap<_, PortKey, PortRule> = open(&lab.layout(), "PORT_RULES");
    let exclude = Exclusions {
        outbound_ports: (1..=u16::MAX).collect(),
        outbound_cidrs: Vec::new(),
        inbound_ports: (1..=u16::MAX).collect(),
    };
    let settings = MeshSettings { exclude, ..MeshSettings::default() };
    capture.apply(&snapshot(settings, vec![workload("a", "192.0.2.1", None)])).unwrap();
    assert_eq!(ports.keys().count(), capacity::RULES_FOR_ALL_PODS);
    let mesh: LpmTrie<_, [u8; 16], MeshEntry> = open(&lab.layout(), "MESH");
    assert_eq!(mesh.keys().count(), 1, "addresses do not wait for exclusions");
    let problems = capture.problems();
    assert!(matches!(&problems[..], [one] if one.contains("mesh-wide excluded ports")), "{problems:?}");

    capture.apply(&snapshot(MeshSettings::default(), vec![workload("a", "192.0.2.1", None)])).unwrap();
    assert_eq!((capture.problems(), ports.keys().count()), (vec![], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_object_with_log_lines_starts_too() {
    let lab = Lab::new();
    let capture = Capture::start(CaptureOptions { bpf_log: true, ..lab.options() }).await.unwrap();
    assert_eq!(lab.links().len(), HOOKS.len());
    assert_eq!(capture.counters()["captured"], 0);
    drop(capture);
    // And gives way to the one without.
    let _capture = lab.start().await;
    assert_eq!(lab.links().len(), HOOKS.len());
}
