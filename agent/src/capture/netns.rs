//! Pods' network namespaces, and running code inside them.
//!
//! Only a thread can be inside a namespace, and `setns` on a runtime thread would move every task that runs on it. So a small
//! fixed set of worker threads ([`workers`]) enters namespaces, makes sockets there and hands them out: a socket stays in the
//! namespace it was made in, whoever uses it.

pub(super) mod netlink;
mod workers;

#[cfg(test)]
#[path = "netns_tests/mod.rs"]
pub(super) mod tests;

use std::{
    any::Any,
    fmt,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};
use socket2::{Domain, Socket, Type};
use tokio::sync::{Semaphore, oneshot};

use self::workers::{Job, Workers};
use super::EnrollError;
use crate::{mesh::PodNamespace, sys};

/// The process's own network namespace. `/proc/self` is the main thread, which never enters another one.
const OWN: &str = "/proc/self/ns/net";

/// A network namespace of a pod, held open. Clones share everything.
#[derive(Clone)]
pub struct Netns {
    namespace: Arc<Namespace>,
    /// One job at a time, so that a pod whose jobs are slow occupies one worker and not all of them. With it, the queue of the
    /// workers never holds more than one job per namespace, plus one detached job for each pod that is being dropped.
    turn: Arc<Semaphore>,
    workers: &'static Workers,
}

/// What a worker thread needs to enter.
struct Namespace {
    path: PathBuf,
    file: Arc<File>,
    cookie: u64,
    device: u64,
    inode: u64,
}

impl Netns {
    /// Takes the namespace that the source of the mesh holds, or looks for it by its name.
    pub fn of(namespace: &PodNamespace) -> Result<Arc<Self>, EnrollError> {
        match namespace.file() {
            Some((file, _)) => Self::new(namespace.name(), Arc::clone(file)),
            None => Self::open(namespace.name()),
        }
    }

    /// Opens the namespace at `path` (`/run/netns/NAME`, `/proc/PID/ns/net`, ...) and enters it once to see that it can be.
    pub fn open(path: &Path) -> Result<Arc<Self>, EnrollError> {
        let refuse = |reason: String| EnrollError::Namespace { path: path.to_owned(), reason };
        // O_NONBLOCK: opening must not hang when the path is a FIFO.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(|error| {
            refuse(match error.kind() {
                io::ErrorKind::NotFound => {
                    "does not exist; is the pod running, and is the directory mounted where the agent runs?".to_owned()
                }
                _ => format!("cannot be opened: {error}"),
            })
        })?;
        Self::new(path, Arc::new(file))
    }

    fn new(path: &Path, file: Arc<File>) -> Result<Arc<Self>, EnrollError> {
        let refuse = |reason: String| EnrollError::Namespace { path: path.to_owned(), reason };
        let not_a_namespace =
            || refuse("is not a network namespace; give a path like /run/netns/NAME or /proc/PID/ns/net".to_owned());
        if fstatfs(&*file).map_err(|errno| refuse(errno.to_string()))?.filesystem_type() != NSFS_MAGIC
            || sys::net::namespace_kind(file.as_fd()).map_err(|error| refuse(error.to_string()))? != libc::CLONE_NEWNET
        {
            return Err(not_a_namespace());
        }
        let metadata = file.metadata().map_err(|error| refuse(error.to_string()))?;
        let own = std::fs::metadata(OWN).map_err(|error| refuse(format!("cannot be compared with {OWN}: {error}")))?;
        if (metadata.dev(), metadata.ino()) == (own.dev(), own.ino()) {
            return Err(refuse(
                "is the agent's own; pods on the host network cannot be enrolled, leave them out of the configuration"
                    .to_owned(),
            ));
        }
        let cookie = cookie_of(&file).map_err(|error| {
            refuse(format!("cannot be entered: {error}; the agent needs CAP_SYS_ADMIN and kernel 5.14"))
        })?;
        let workers = Workers::shared().map_err(|error| refuse(format!("no worker thread to enter it: {error}")))?;
        Ok(Arc::new(Self {
            namespace: Arc::new(Namespace {
                path: path.to_owned(),
                file,
                cookie,
                device: metadata.dev(),
                inode: metadata.ino(),
            }),
            turn: Arc::new(Semaphore::new(1)),
            workers,
        }))
    }

    /// The path it was opened by, or its name.
    pub fn path(&self) -> &Path {
        &self.namespace.path
    }

    /// Its cookie (`SO_NETNS_COOKIE`): never used twice while the machine runs.
    pub fn cookie(&self) -> u64 {
        self.namespace.cookie
    }

    /// Its inode number on nsfs, as in `/proc/PID/ns/net`. Used again after the namespace is gone, so it names a namespace only
    /// while this value lives.
    pub fn inode(&self) -> u64 {
        self.namespace.inode
    }

    /// Its descriptor.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.namespace.file.as_fd()
    }

    /// Device and inode number. Like [`Netns::inode`], they name it only while this value lives.
    pub(super) fn id(&self) -> (u64, u64) {
        (self.namespace.device, self.namespace.inode)
    }

    /// Is the file with this `stat` the same namespace?
    pub(super) fn is(&self, metadata: &std::fs::Metadata) -> bool {
        (metadata.dev(), metadata.ino()) == self.id()
    }

    /// Runs `f` on a worker thread inside the namespace. `f` must not wait for anything that a pod decides about, and not change
    /// namespaces itself.
    ///
    /// # Panics
    /// A panic of `f` goes on in the caller. Entering was seen to work in [`Netns::open`]; should it fail now (out of kernel
    /// memory), that is a panic too. [`Netns::try_run`] makes errors of both.
    pub async fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        match self.enter(f).await {
            Ok(Ok(value)) => value,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(error) => panic!("entering network namespace {} again: {error}", self.path().display()),
        }
    }

    /// [`Netns::run`] with every failure as an error.
    pub async fn try_run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        self.enter(f).await?.map_err(|panic| {
            let message = panic
                .downcast_ref::<&str>()
                .map(|message| (*message).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned());
            io::Error::other(format!(
                "a job in network namespace {} panicked: {}",
                self.path().display(),
                message.unwrap_or_default()
            ))
        })
    }

    /// Queues `f` and returns at once: for `Drop`, where nothing can be awaited. `f` learns whether the namespace was entered.
    pub(super) fn detach(&self, f: impl FnOnce(io::Result<()>) + Send + 'static) {
        self.workers.submit(Job { namespace: Arc::clone(&self.namespace), work: Box::new(f) });
    }

    async fn enter<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Result<T, Box<dyn Any + Send>>> {
        let turn = Arc::clone(&self.turn).acquire_owned().await.map_err(io::Error::other)?;
        let (reply, answer) = oneshot::channel();
        let work = Box::new(move |entered: io::Result<()>| {
            // A caller that has gone away does not want the answer.
            let _ = reply.send(entered.map(|()| catch_unwind(AssertUnwindSafe(f))));
            // Held until here even if the caller stopped waiting: the job is what the turn limits.
            drop(turn);
        });
        self.workers.submit(Job { namespace: Arc::clone(&self.namespace), work });
        answer.await.map_err(|_| io::Error::other("the worker thread dropped the job"))?
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netns").field("path", &self.path()).field("cookie", &self.cookie()).finish_non_exhaustive()
    }
}

/// Does the namespace of the calling thread have IPv6? Not when the kernel is without it or `disable_ipv6` is set for all interfaces.
pub(super) fn has_ipv6_here() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|value| value.trim() == "0")
}

/// Enters on a thread of its own, because this runs before anything is known about the namespace.
fn cookie_of(file: &File) -> io::Result<u64> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns-open".to_owned())
            .spawn_scoped(scope, || {
                setns(file, CloneFlags::CLONE_NEWNET)?;
                let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
                sys::net::netns_cookie(socket.as_fd())
            })?
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))
    })
}
