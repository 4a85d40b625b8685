//! Installing into directories as nodes have them.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    thread,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const CALICO: &str = r#"{"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [
  {"type": "calico", "mtu": 1.50e3, "ipam": {"type": "calico-ipam"}},
  {"type": "portmap", "capabilities": {"portMappings": true}}
]}
"#;
const BRIDGE: &str = r#"{"cniVersion":"0.4.0","name":"bridge","type":"bridge","ipam":{"type":"host-local"}}"#;

/// A node's directories.
struct Node {
    directory: TempDir,
    installer: Installer,
}

impl Node {
    fn with(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["image", "bin", "net.d"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::write(path("image/underpass-cni"), "program 1").unwrap();
        let installer = Installer {
            program: path("image/underpass-cni"),
            bin_dir: path("bin"),
            conf_dir: path("net.d"),
            conf_name: None,
            entry: Entry {
                socket: "/run/underpass/cni/agent.sock".into(),
                projection: "/run/underpass/cni/enrolment.json".into(),
                exempt_namespaces: vec!["kube-system".into()],
            },
        };
        let node = Self { directory, installer };
        for (name, text) in files {
            fs::write(node.conf(name), text).unwrap();
        }
        node
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.installer.conf_dir.join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.conf(name)).unwrap()
    }

    /// Names in the configurations' directory.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.installer.conf_dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn ensure(&self) -> State {
        self.installer.ensure().unwrap()
    }

    /// What [`Installer::ensure`] says when all is well.
    fn chained(&self, name: &str, changed: bool) -> State {
        State::Chained { file: self.conf(name), changed, skipped: Vec::new() }
    }

    fn types(&self, name: &str) -> Vec<String> {
        let value: Value = serde_json::from_str(&self.text(name)).unwrap();
        let plugins = value["plugins"].as_array().unwrap().iter();
        plugins.map(|plugin| plugin["type"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn the_first_list_gets_the_entry_and_gives_it_back() {
    let node = Node::with(&[("10-calico.conflist", CALICO), ("20-other.conflist", CALICO), ("calico-kubeconfig", "x")]);
    assert_eq!(node.ensure(), node.chained("10-calico.conflist", true));
    assert_eq!(node.types("10-calico.conflist"), ["calico", "portmap", "underpass-cni"]);
    let value: Value = serde_json::from_str(&node.text("10-calico.conflist")).unwrap();
    let expected = json!({
        "type": "underpass-cni",
        "socket": "/run/underpass/cni/agent.sock",
        "projection": "/run/underpass/cni/enrolment.json",
        "exemptNamespaces": ["kube-system"],
    });
    assert_eq!(value["plugins"][2], expected);
    assert_eq!(node.text("20-other.conflist"), CALICO);
    let program = node.installer.bin_dir.join("underpass-cni");
    assert_eq!(fs::read_to_string(&program).unwrap(), "program 1");
    assert_eq!(fs::metadata(&program).unwrap().mode() & 0o7777, 0o755);

    let removed = node.installer.remove().unwrap();
    let expected = Removed { files: vec![node.conf("10-calico.conflist")], program: true, skipped: Vec::new() };
    assert_eq!(removed, expected);
    assert_eq!(node.text("10-calico.conflist"), CALICO);
    assert!(!program.exists());
    assert_eq!(node.installer.remove().unwrap(), Removed::default());
    assert_eq!(node.names(), ["10-calico.conflist", "20-other.conflist", "calico-kubeconfig"]);
}

#[test]
fn what_is_in_place_is_not_written_again() {
    let node = Node::with(&[("10-calico.conflist", CALICO)]);
    node.ensure();
    let files = [node.conf("10-calico.conflist"), node.installer.bin_dir.join("underpass-cni")];
    let inodes = || files.each_ref().map(|file| fs::metadata(file).unwrap().ino());
    let before = inodes();
    assert_eq!(node.ensure(), node.chained("10-calico.conflist", false));
    assert_eq!(inodes(), before);
}

#[test]
fn a_new_program_replaces_the_old_one_under_its_name() {
    let mut node = Node::with(&[("10-calico.conflist", CALICO)]);
    node.ensure();
    let program = node.installer.bin_dir.join("underpass-cni");
    let before = fs::metadata(&program).unwrap().ino();
    fs::write(&node.installer.program, "program 2").unwrap();
    assert_eq!(node.ensure(), node.chained("10-calico.conflist", true));
    assert_eq!(fs::read_to_string(&program).unwrap(), "program 2");
    assert_ne!(fs::metadata(&program).unwrap().ino(), before, "whoever runs the old one keeps it");
    fs::set_permissions(&program, Permissions::from_mode(0o600)).unwrap();
    assert_eq!(node.ensure(), node.chained("10-calico.conflist", true));
    assert_eq!(fs::metadata(&program).unwrap().mode() & 0o7777, 0o755);
    node.installer.program = node.directory.path().join("nowhere");
    let error = node.installer.ensure().unwrap_err().to_string();
    assert!(error.starts_with("reading ") && error.contains("nowhere"), "{error}");
}

#[test]
fn an_entry_that_differs_is_brought_up_to_date() {
    let mut node = Node::with(&[("10-calico.conflist", CALICO)]);
    node.ensure();
    node.installer.entry.exempt_namespaces.clear();
    assert_eq!(node.ensure(), node.chained("10-calico.conflist", true));
    assert!(node.text("10-calico.conflist").contains(r#""exemptNamespaces":[]"#));
    assert_eq!(node.types("10-calico.conflist").len(), 3);
}

#[test]
fn a_cni_that_writes_its_list_anew_is_chained_to_again() {
    let node = Node::with(&[("10-calico.conflist", CALICO)]);
    node.ensure();
    fs::write(node.conf("10-calico.conflist"), CALICO).unwrap();
    assert_eq!(node.ensure(), node.chained("10-calico.conflist", true));
}

#[test]
fn a_list_that_comes_before_takes_over() {
    let node = Node::with(&[("10-calico.conflist", CALICO)]);
    node.ensure();
    fs::write(node.conf("05-cilium.conflist"), CALICO.replace("calico\"", "cilium\"")).unwrap();
    assert_eq!(node.ensure(), node.chained("05-cilium.conflist", true));
    assert_eq!(node.types("05-cilium.conflist"), ["cilium", "portmap", "underpass-cni"]);
    assert_eq!(node.text("10-calico.conflist"), CALICO);
    // As Cilium puts others out of the way: not a name that a runtime reads.
    fs::rename(node.conf("10-calico.conflist"), node.conf("10-calico.conflist.cilium_bak")).unwrap();
    assert_eq!(node.ensure(), node.chained("05-cilium.conflist", false));
}

#[test]
fn the_runtime_can_use_another_than_the_first() {
    let mut node = Node::with(&[("10-calico.conflist", CALICO), ("20-other.conflist", CALICO)]);
    node.ensure();
    node.installer.conf_name = Some("20-other.conflist".into());
    assert_eq!(node.ensure(), node.chained("20-other.conflist", true));
    assert_eq!(node.text("10-calico.conflist"), CALICO);
    node.installer.conf_name = Some("30-missing.conflist".into());
    assert_eq!(node.ensure(), State::NoNetwork { skipped: Vec::new() });
    assert_eq!(node.text("20-other.conflist"), CALICO);
    node.installer.conf_name = Some("../x.conflist".into());
    let error = node.installer.ensure().unwrap_err().to_string();
    assert_eq!(error, "conf_name: \"../x.conflist\" has to be the name of a file in the runtime's directory");
}

#[test]
fn without_a_network_there_is_nothing_to_chain_to() {
    let node = Node::with(&[("README", "x")]);
    assert_eq!(node.ensure(), State::NoNetwork { skipped: Vec::new() });
    assert!(node.installer.bin_dir.join("underpass-cni").exists(), "it is there when the network comes");
    fs::write(node.conf("10-calico.conflist"), CALICO).unwrap();
    assert_eq!(node.ensure(), node.chained("10-calico.conflist", true));
    fs::remove_dir_all(&node.installer.conf_dir).unwrap();
    assert_eq!(node.ensure(), State::NoNetwork { skipped: Vec::new() });
    assert!(node.installer.remove().unwrap().program);
}

#[test]
fn files_that_are_no_configuration_are_passed_over_and_named() {
    let large = format!("{CALICO}{}", " ".repeat(2 << 20));
    let node = Node::with(&[
        ("00-empty.conflist", ""),
        ("01-half.conflist", &CALICO[..50]),
        ("02-no-network.conflist", r#"{"name":"a","cniVersion":"1.0.0","plugins":[]}"#),
        ("03-large.conflist", &large),
        ("04-list.conf", CALICO),
        ("10-calico.conflist", CALICO),
        ("99-half.conflist", "{"),
    ]);
    fs::write(node.conf("05-latin.conflist"), b"{\"name\":\"\xe9\"}").unwrap();
    let State::Chained { file, changed: true, skipped } = node.ensure() else { panic!("not chained") };
    assert_eq!(file, node.conf("10-calico.conflist"));
    let names: Vec<_> = skipped.iter().map(|skipped| skipped.file.file_name().unwrap().to_str().unwrap()).collect();
    let expected = ["00-empty", "01-half", "02-no-network", "03-large", "04-list", "05-latin", "99-half"];
    let suffix = |name: &&str| if *name == "04-list" { ".conf" } else { ".conflist" };
    assert_eq!(names, expected.iter().map(|name| format!("{name}{}", suffix(name))).collect::<Vec<_>>());
    let text = skipped[1].to_string();
    assert!(text.contains("01-half.conflist: not a network configuration: EOF while parsing"), "{text}");
    let removed = node.installer.remove().unwrap();
    assert_eq!(removed.files, [node.conf("10-calico.conflist")]);
    assert!(removed.skipped.len() >= 4, "{removed:?}");
    fs::remove_file(node.conf("10-calico.conflist")).unwrap();
    let State::NoNetwork { skipped } = node.ensure() else { panic!("chained to nothing") };
    assert_eq!(skipped.len(), 7);
}

#[test]
fn a_version_that_the_plugin_does_not_speak_is_refused() {
    let node = Node::with(&[("10-calico.conflist", &CALICO.replace("0.3.1", "2.0.0")), ("20-b.conflist", CALICO)]);
    let error = node.installer.ensure().unwrap_err();
    assert!(matches!(error, InstallError::Refused { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("10-calico.conflist: cniVersion 2.0.0 is not supported"), "{text}");
    assert_eq!(node.text("20-b.conflist"), CALICO, "the runtime does not use it");
}

#[test]
fn a_single_plugin_stays_and_a_list_stands_before_it() {
    let node = Node::with(&[("10-bridge.conf", BRIDGE), ("20-b.conflist", CALICO)]);
    let stand_in = "10-bridge.00-underpass-conf.conflist";
    assert_eq!(node.ensure(), node.chained(stand_in, true));
    assert_eq!(node.names(), [stand_in, "10-bridge.conf", "20-b.conflist"]);
    assert_eq!(node.text("10-bridge.conf"), BRIDGE);
    assert_eq!(node.types(stand_in), ["bridge", "underpass-cni"]);
    assert_eq!(node.ensure(), node.chained(stand_in, false));
    // Its owner changes it.
    fs::write(node.conf("10-bridge.conf"), BRIDGE.replace("host-local", "dhcp")).unwrap();
    assert_eq!(node.ensure(), node.chained(stand_in, true));
    assert!(node.text(stand_in).contains("dhcp"));
    // Half way through writing, what was there goes on.
    fs::write(node.conf("10-bridge.conf"), &BRIDGE[..20]).unwrap();
    let State::Chained { file, changed: false, skipped } = node.ensure() else { panic!("not left alone") };
    assert_eq!((file, skipped.len()), (node.conf(stand_in), 1));
    // Its owner takes it away, and what was made of it goes as well.
    fs::remove_file(node.conf("10-bridge.conf")).unwrap();
    assert_eq!(node.ensure(), node.chained("20-b.conflist", true));
    assert_eq!(node.names(), ["20-b.conflist"]);
}

#[test]
fn removing_gives_back_a_single_plugin() {
    let node = Node::with(&[("10-bridge.conf", BRIDGE)]);
    node.ensure();
    let removed = node.installer.remove().unwrap();
    assert_eq!(removed.files, [node.conf("10-bridge.00-underpass-conf.conflist")]);
    assert_eq!(node.names(), ["10-bridge.conf"]);
    assert_eq!(node.text("10-bridge.conf"), BRIDGE);
}

#[test]
fn a_linked_list_stays_a_link() {
    let node = Node::with(&[]);
    let target = node.directory.path().join("calico");
    fs::write(&target, CALICO).unwrap();
    symlink(&target, node.conf("10-calico.conflist")).unwrap();
    let stand_in = "10-calico.00-underpass-conflist.conflist";
    assert_eq!(node.ensure(), node.chained(stand_in, true));
    assert_eq!(node.ensure(), node.chained(stand_in, false));
    assert_eq!(node.types(stand_in), ["calico", "portmap", "underpass-cni"]);
    assert!(fs::symlink_metadata(node.conf("10-calico.conflist")).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&target).unwrap(), CALICO);
    node.installer.remove().unwrap();
    assert_eq!(node.names(), ["10-calico.conflist"]);
    // To a place that only the host has.
    fs::remove_file(&target).unwrap();
    let error = node.installer.ensure().unwrap_err().to_string();
    assert!(error.starts_with("reading ") && error.contains("10-calico.conflist"), "{error}");
}

#[test]
fn mode_and_owner_are_kept() {
    let node = Node::with(&[("10-calico.conflist", CALICO)]);
    let file = node.conf("10-calico.conflist");
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    // Only root can give files away; as another user there is nothing to keep but one's own.
    let owner = if nix::unistd::geteuid().is_root() {
        (1234, 2345)
    } else {
        (fs::metadata(&file).unwrap().uid(), fs::metadata(&file).unwrap().gid())
    };
    std::os::unix::fs::chown(&file, Some(owner.0), Some(owner.1)).unwrap();
    node.ensure();
    let after = fs::metadata(&file).unwrap();
    assert_eq!((after.mode() & 0o7777, (after.uid(), after.gid())), (0o600, owner));
    node.installer.remove().unwrap();
    let after = fs::metadata(&file).unwrap();
    assert_eq!((after.mode() & 0o7777, (after.uid(), after.gid())), (0o600, owner));
}

#[test]
fn what_a_killed_installer_left_is_swept() {
    let node = Node::with(&[("10-calico.conflist", CALICO), (".underpass-abc", "half")]);
    fs::write(node.installer.bin_dir.join(".underpass-def"), "half").unwrap();
    fs::write(node.installer.bin_dir.join(".other"), "whole").unwrap();
    node.ensure();
    assert_eq!(node.names(), ["10-calico.conflist"]);
    assert!(!node.installer.bin_dir.join(".underpass-def").exists());
    assert!(node.installer.bin_dir.join(".other").exists());
}

#[test]
fn settings_that_cannot_be_written_are_refused() {
    let mut node = Node::with(&[("10-calico.conflist", CALICO)]);
    node.installer.entry.socket = "agent.sock".into();
    let error = node.installer.ensure().unwrap_err().to_string();
    assert_eq!(error, "socket: \"agent.sock\" has to be an absolute path");
    node.installer.entry.socket = "/run/agent.sock".into();
    node.installer.bin_dir = "/nonexistent/bin".into();
    let error = node.installer.ensure().unwrap_err().to_string();
    assert!(error.starts_with("opening /nonexistent/bin: no such directory"), "{error}");
    assert_eq!(node.text("10-calico.conflist"), CALICO);
}

#[test]
fn two_installers_do_not_work_at_once() {
    let node = Node::with(&[("10-calico.conflist", CALICO)]);
    let lock = node.installer.lock().unwrap().unwrap();
    assert!(matches!(node.installer.ensure(), Err(InstallError::Busy(_))));
    assert!(matches!(node.installer.remove(), Err(InstallError::Busy(_))));
    drop(lock);
    node.ensure();
}

#[test]
fn a_reader_never_sees_half_a_file_beside_a_busy_owner() {
    let node = Node::with(&[("10-calico.conflist", CALICO)]);
    let file = node.conf("10-calico.conflist");
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                serde_json::from_slice::<Value>(&fs::read(&file).unwrap()).unwrap();
            }
        });
        // The owner writes a version after the other, each at once, while the entry goes in and out.
        let owner = scope.spawn(|| {
            for version in 0..200 {
                let text = CALICO.replace("k8s-pod-network", &format!("v{version}"));
                let next = node.conf("next");
                fs::write(&next, text).unwrap();
                fs::rename(&next, &file).unwrap();
            }
        });
        while !owner.is_finished() {
            for result in [node.installer.ensure().map(drop), node.installer.remove().map(drop)] {
                if let Err(error) = result {
                    assert!(matches!(error, InstallError::Changing(_)), "{error}");
                }
            }
        }
        owner.join().unwrap();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    node.installer.remove().unwrap();
    assert_eq!(node.names(), ["10-calico.conflist"]);
}
