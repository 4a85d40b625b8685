//! A node's directory, an agent on its socket, and the plugin.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write as _,
    os::{
        fd::OwnedFd,
        unix::{
            fs::MetadataExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use underpass_cni::{
    projection::{Projection, Treatment},
    protocol::{self, Answer, Request},
};

/// Longest that a test waits for what should come at once.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// A network namespace that is always there.
pub const NETNS: &str = "/proc/self/ns/net";

/// A node.
pub struct Node {
    directory: TempDir,
}

impl Node {
    /// Without agent and projection.
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub fn projection(&self) -> PathBuf {
        self.directory.path().join("enrolment.json")
    }

    /// Writes the projection.
    pub fn project(&self, namespaces: &[(&str, Treatment)]) {
        let namespaces: BTreeMap<_, _> = namespaces.iter().map(|(name, what)| ((*name).to_owned(), *what)).collect();
        Projection::new(namespaces).write(&self.projection()).unwrap();
    }

    /// What a runtime gives the plugin on standard input for `ADD`.
    pub fn config(&self) -> Value {
        json!({
            "cniVersion": "1.1.0",
            "name": "net",
            "type": "underpass-cni",
            "socket": self.socket(),
            "projection": self.projection(),
            "exemptNamespaces": ["kube-system"],
            "somebody": {"elses": 1.5},
            "runtimeConfig": {"portMappings": []},
            "prevResult": {
                "cniVersion": "1.1.0",
                "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": NETNS}],
                "ips": [{"interface": 1, "address": "10.1.2.3/24", "gateway": "10.1.2.1"}, {"address": "fd00::3/64"}],
                "dns": {},
            },
        })
    }

    /// A call of the plugin for pod `shop/web-0`.
    pub fn call(&self, command: &str) -> Call {
        let mut call = Call { variables: BTreeMap::new(), stdin: self.config().to_string().into_bytes() };
        call.set("CNI_COMMAND", command)
            .set("CNI_CONTAINERID", "c0ffee")
            .set("CNI_NETNS", NETNS)
            .set("CNI_IFNAME", "eth0")
            .set("CNI_PATH", "/opt/cni/bin")
            .set("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=6f3c");
        call
    }

    /// An agent that does this with every connection, until it goes out of scope.
    pub fn agent(&self, serve: impl Fn(&UnixStream) + Send + Sync + 'static) -> Agent {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let stop = listener.try_clone().unwrap();
        let serving = thread::spawn(move || {
            let serve = &serve;
            thread::scope(|scope| {
                while let Ok((stream, _)) = listener.accept() {
                    scope.spawn(move || serve(&stream));
                }
            });
        });
        Agent { stop, serving: Some(serving), socket: self.socket() }
    }

    /// An agent that answers every request with this, and tells what it was asked.
    pub fn answering(&self, answer: Answer) -> (Agent, Receiver<Asked>) {
        let (sender, receiver) = mpsc::channel();
        let agent = self.agent(move |stream| {
            // A plugin that has nothing to ask after all leaves without a request. Not every test wants to know what it was.
            let Ok((request, descriptor)) = protocol::receive_request(stream) else { return };
            let _ = sender.send(Asked { request, namespace: descriptor.map(inode) });
            protocol::send_answer(stream, &answer).unwrap();
        });
        (agent, receiver)
    }
}

/// A request as the agent got it.
pub struct Asked {
    pub request: Request,
    /// Inode of the descriptor that came with it.
    pub namespace: Option<u64>,
}

fn inode(descriptor: OwnedFd) -> u64 {
    File::from(descriptor).metadata().unwrap().ino()
}

/// The test's own network namespace, which is what [`NETNS`] is for the plugin.
pub fn namespace() -> u64 {
    File::open(NETNS).unwrap().metadata().unwrap().ino()
}

/// Stops when it goes out of scope, also when the test fails; the socket's file stays, as a killed agent's does.
pub struct Agent {
    stop: UnixListener,
    serving: Option<thread::JoinHandle<()>>,
    socket: PathBuf,
}

impl Agent {
    /// Ends, and takes the socket's file away as well.
    pub fn remove(self) {
        std::fs::remove_file(&self.socket).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&self.stop), nix::sys::socket::Shutdown::Both)
            .unwrap();
        let served = self.serving.take().map(thread::JoinHandle::join);
        if !thread::panicking() {
            served.unwrap().unwrap();
        }
    }
}

/// One start of the plugin.
pub struct Call {
    variables: BTreeMap<String, std::ffi::OsString>,
    stdin: Vec<u8>,
}

impl Call {
    pub fn set(&mut self, name: &str, value: impl Into<std::ffi::OsString>) -> &mut Self {
        self.variables.insert(name.into(), value.into());
        self
    }

    pub fn unset(&mut self, name: &str) -> &mut Self {
        self.variables.remove(name).unwrap();
        self
    }

    pub fn stdin(&mut self, stdin: impl Into<Vec<u8>>) -> &mut Self {
        self.stdin = stdin.into();
        self
    }

    /// Changes the configuration.
    pub fn edit(&mut self, edit: impl FnOnce(&mut Value)) -> &mut Self {
        let mut config = serde_json::from_slice(&self.stdin).unwrap();
        edit(&mut config);
        self.stdin(config.to_string())
    }

    pub fn pod(&mut self, namespace: &str) -> &mut Self {
        self.set("CNI_ARGS", format!("K8S_POD_NAME=web-0;K8S_POD_NAMESPACE={namespace}"))
    }

    pub fn start(&self) -> Running {
        let mut child = Command::new(env!("CARGO_BIN_EXE_underpass-cni"))
            .env_clear()
            .envs(&self.variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may be satisfied before it has read everything.
        let _ = child.stdin.take().unwrap().write_all(&self.stdin);
        Running { child: Some(child), started: Instant::now() }
    }

    pub fn run(&self) -> Outcome {
        self.start().end()
    }
}

/// A plugin that runs; killed when it goes out of scope.
pub struct Running {
    child: Option<Child>,
    started: Instant,
}

impl Running {
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    pub fn end(mut self) -> Outcome {
        let output = self.child.take().unwrap().wait_with_output().unwrap();
        Outcome {
            success: output.status.success(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How it ended.
#[derive(Debug)]
pub struct Outcome {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Outcome {
    /// The result that was printed.
    #[track_caller]
    pub fn result(&self) -> Value {
        assert!(self.success, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// It succeeded and printed nothing.
    #[track_caller]
    pub fn nothing(&self) {
        assert!(self.success && self.stdout.is_empty(), "{self:?}");
    }

    /// It failed with this code; gives the message.
    #[track_caller]
    pub fn failure(&self, code: u16) -> String {
        assert!(!self.success, "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).unwrap();
        assert_eq!(error["code"], code, "{self:?}");
        assert!(error["cniVersion"].is_string(), "{self:?}");
        error["msg"].as_str().unwrap().to_owned()
    }
}
