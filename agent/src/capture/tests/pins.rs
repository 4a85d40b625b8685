use std::path::Path;

use super::{
    super::{
        CaptureError,
        lock::PinLock,
        pins::{self, Direction, Layout, TcPin},
    },
    lab,
};

#[test]
fn tc_pins_are_read_back() {
    let names = [
        (Direction::Ingress, false, "tc-4096-12-ingress"),
        (Direction::Egress, false, "tc-4096-12-egress"),
        (Direction::Egress, true, "tc-4096-12-egress-moved"),
        (Direction::Node, false, "tc-4096-12-node"),
    ];
    for (direction, moved, name) in names {
        let pin = TcPin { pod_id: 4096, interface: 12, direction, moved };
        assert_eq!(pin.to_string(), name);
        assert_eq!(name.parse(), Ok(pin));
        assert_eq!(format!("{name}-new").parse(), Ok(pin), "an interrupted replacement belongs to the pod too");
    }
    for other in ["connect4", "tc-1-2", "tc-1-ingress", "tc-x-2-ingress", "tc-1-2-ingress-old", "tc-1-2-ingress-new-x"]
    {
        assert_eq!(other.parse::<TcPin>(), Err(()), "{other}");
    }
}

#[test]
fn only_directories_of_versions_are_ours() {
    let root = tempfile::tempdir().unwrap();
    for dir in ["0123456789abcdef", "fedcba9876543210", "other", "0123456789ABCDEF", "0123"] {
        std::fs::create_dir(root.path().join(dir)).unwrap();
    }
    std::fs::write(root.path().join("aaaaaaaaaaaaaaaa"), "").unwrap();
    let found = pins::versions(root.path(), Some("fedcba9876543210")).unwrap();
    assert_eq!(found, [Layout::new(root.path(), "0123456789abcdef")]);
    assert!(pins::versions(Path::new("/nonexistent"), None).unwrap().is_empty());
}

#[test]
fn a_pin_root_has_one_owner() {
    let root = tempfile::tempdir().unwrap();
    let lock = PinLock::acquire(root.path()).unwrap();
    let error = PinLock::acquire(root.path()).unwrap_err().to_string();
    let pid = std::process::id();
    assert!(error.contains(&format!("pid {pid}")) && error.contains(root.path().to_str().unwrap()), "{error}");
    drop(lock);
    let lock = PinLock::acquire(root.path()).unwrap();
    lock.remove().unwrap();
    PinLock::acquire(root.path()).unwrap().remove().unwrap();
}

#[test]
fn a_cgroup_v1_directory_is_refused_with_a_remedy() {
    pins::check_cgroup(&lab::cgroup_mount()).unwrap();
    let error = pins::check_cgroup(Path::new("/run")).unwrap_err().to_string();
    assert!(error.contains("/run") && error.contains(lab::cgroup_mount().to_str().unwrap()), "{error}");
    let error = pins::check_cgroup(Path::new("/sys/fs/cgroup/unified/none-such")).unwrap_err();
    assert!(matches!(error, CaptureError::Path { .. }), "{error}");
}

#[test]
fn a_pin_root_elsewhere_is_refused_with_a_remedy() {
    let root = tempfile::tempdir().unwrap();
    let error = pins::prepare_root(&root.path().join("pins")).unwrap_err().to_string();
    assert!(error.contains("mount -t bpf"), "{error}");
}
