//! Network namespaces without a name: they vanish with the last thread and descriptor in them, however a test ends.

use std::{
    fs::{self, File},
    net::{Ipv6Addr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _},
    process::{Command, id},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
};
use socket2::{Domain, Socket, Type};

/// A network namespace with `lo` up.
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Makes one.
    pub fn new() -> Result<Self> {
        let file = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace; are you root?")?;
            File::open("/proc/thread-self/ns/net").context("opening the new network namespace")
        })
        .join()
        .expect("the thread returns its errors")?;
        let namespace = Self { file };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Runs `f` on a thread inside.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| setns(&self.file, CloneFlags::CLONE_NEWNET).map(|()| f()));
            match thread.join() {
                Ok(result) => result.context("entering a network namespace"),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs one iproute2 command inside.
    pub fn ip(&self, arguments: &str) -> Result<()> {
        let output =
            self.enter(|| Command::new("ip").args(arguments.split_whitespace()).output())?.context("running ip")?;
        ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Waits until one of its IPv6 addresses is in use: the kernel goes on adding it after it was asked to.
    pub fn wait_for_address(&self, address: Ipv6Addr) -> Result<()> {
        const LOCAL: u32 = 0x8000_0000; // RTF_LOCAL
        let address = format!("{:032x}", u128::from(address));
        self.enter(|| {
            eventually("a local route to an IPv6 address", || {
                let routes =
                    fs::read_to_string("/proc/thread-self/net/ipv6_route").context("reading the IPv6 routes")?;
                Ok(routes.lines().map(|route| route.split_whitespace().collect::<Vec<_>>()).any(|route| {
                    let flags = route.get(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
                    route[0] == address && flags.is_some_and(|flags| flags & LOCAL != 0)
                }))
            })
        })?
    }

    /// A path that names it for iproute2 while `self` lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", id(), self.file.as_raw_fd())
    }

    /// The number that BPF programs know it by.
    pub fn cookie(&self) -> Result<u64> {
        self.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            let (mut cookie, mut length) = (0u64, size_of::<u64>() as libc::socklen_t);
            // SAFETY: the kernel writes at most `length` bytes to `cookie`.
            let result = unsafe {
                let value = (&raw mut cookie).cast();
                libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, value, &raw mut length)
            };
            nix::errno::Errno::result(result).context("getsockopt SO_NETNS_COOKIE")?;
            Ok(cookie)
        })?
    }

    /// Connects two namespaces with a veth pair named `eth0` on both sides: 10.9.0.1 and `fd09::1` here, 10.9.0.2 and
    /// `fd09::2` there.
    pub fn connect(&self, other: &Self) -> Result<()> {
        let peer = other.path();
        self.ip(&format!(
            "link add eth0 address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns {peer}"
        ))?;
        for (namespace, host) in [(self, 1), (other, 2)] {
            namespace.ip(&format!("addr add 10.9.0.{host}/24 dev eth0"))?;
            namespace.ip(&format!("addr add fd09::{host}/64 dev eth0 nodad"))?;
            namespace.ip("link set eth0 up")?;
        }
        // known neighbours: packets leave while the system call that sends them runs
        for (namespace, far) in [(self, 2), (other, 1)] {
            for address in [format!("10.9.0.{far}"), format!("fd09::{far}")] {
                namespace
                    .ip(&format!("neigh replace {address} lladdr 02:00:00:00:00:0{far} dev eth0 nud permanent"))?;
            }
        }
        Ok(())
    }
}

/// Accepts the next connection on any of the listeners; one that does not come within 10 s is an error, not a hanging test.
pub fn accept(listeners: &[TcpListener]) -> Result<TcpStream> {
    let mut ready: Vec<_> = listeners.iter().map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)).collect();
    poll(&mut ready, PollTimeout::from(10_000u16)).context("waiting for a connection")?;
    let waiting = ready.iter().position(|ready| ready.any().unwrap_or(false));
    let waiting = waiting.with_context(|| format!("no connection arrived on {listeners:?}"))?;
    Ok(listeners[waiting].accept()?.0)
}

/// Waits until something holds that no event tells. Closing a socket is such a thing: a child that another test is starting
/// has a copy of every descriptor for a moment.
pub fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds()? {
        ensure!(Instant::now() < deadline, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
