//! Answers the plugin.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{debug, info, warn};
use underpass_cni::protocol::{self, Answer, Command, Request};

use super::{
    DIRECTORY,
    store::{Store, handed, key},
};
use crate::{
    bounds::Bound,
    mesh::{NetnsId, WorkloadKey},
    proxy::Reconciler,
    socket_file::SocketFile,
    sources::kubernetes::{Attachment, Attachments, Verdict},
};

/// How long a pod's start is held at most. The kubelet gives the whole sandbox two minutes (`runtimeRequestTimeout`), and the
/// plugin waits a little longer than this.
const HOLD: Duration = Duration::from_secs(15);
/// How long a request may take to come, and an answer to go.
const TRANSFER: Duration = Duration::from_secs(5);
/// Requests being read at once; more wait in the listen queue. Only root can connect.
const AT_ONCE: usize = 128;
/// Pods whose starts are held at once; more are to be tried again. A node that starts has some
/// hundreds.
const HELD: usize = 2048;
/// Pause after a failed `accept` (out of descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Everything needed for an answer.
struct Desk {
    attachments: Attachments,
    pods: Arc<Reconciler>,
    store: Store,
    /// Requests that are being answered: a pod whose start is held does not keep another's request
    /// from being read.
    held: Semaphore,
}

/// What earlier agents were handed, below the run directory.
pub fn recall(run_dir: &Path) -> io::Result<Vec<Attachment>> {
    Ok(store(run_dir)?.recall())
}

fn store(run_dir: &Path) -> io::Result<Store> {
    Store::open(run_dir.join(DIRECTORY).join("attachments"))
}

/// Opens the socket below the run directory. The future answers until it is dropped.
pub fn serve(
    run_dir: &Path,
    attachments: Attachments,
    pods: Arc<Reconciler>,
) -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let socket = SocketFile::bind(&super::socket(run_dir))?;
    let store = store(run_dir)?;
    Ok(accept(socket, Arc::new(Desk { attachments, pods, store, held: Semaphore::new(HELD) })))
}

async fn accept(socket: SocketFile, desk: Arc<Desk>) {
    let mut requests = JoinSet::new();
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let turn = Arc::clone(&turns).acquire_owned().await.expect("the semaphore is never closed");
        let accepted = tokio::select! {
            accepted = socket.listener.accept() => accepted,
            Some(_) = requests.join_next() => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let desk = Arc::clone(&desk);
                requests.spawn(async move {
                    if let Err(error) = answer(&desk, stream, turn).await {
                        debug!(%error, "a request of the CNI plugin");
                    }
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept the CNI plugin's connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn answer(desk: &Desk, stream: UnixStream, turn: OwnedSemaphorePermit) -> io::Result<()> {
    // Descriptors travel with the bytes, which the runtime's streams do not offer.
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TRANSFER))?;
    stream.set_write_timeout(Some(TRANSFER))?;
    let read = spawn_blocking(move || {
        let request = protocol::receive_request(&stream);
        (stream, request)
    });
    let (stream, request) = read.await.map_err(io::Error::other)?;
    drop(turn);
    let answer = match request {
        Ok((request, netns)) => {
            if let Ok(_place) = desk.held.try_acquire() {
                desk.act(request, netns).await
            } else {
                Bound::Cni.refused();
                refused("too many pods of this node are being started at once", true)
            }
        }
        Err(error) => Answer::Refused { message: format!("the request cannot be read: {error}"), retry: false },
    };
    spawn_blocking(move || protocol::send_answer(&stream, &answer)).await.map_err(io::Error::other)?
}

impl Desk {
    async fn act(&self, request: Request, netns: Option<OwnedFd>) -> Answer {
        match request.command {
            // It has no identity, so it starts as everybody else does who is not in the mesh: also while the API server,
            // which may be that pod itself, has not told of it.
            Command::Add(attachment) | Command::Check(attachment) if attachment.pod.is_static() => {
                Answer::Done { held: false }
            }
            Command::Add(attachment) => match netns {
                Some(netns) => self.add(attachment, netns.into()).await,
                None => refused("the request came without the pod's network namespace", false),
            },
            Command::Check(attachment) => self.check(&attachment.container, &key(&attachment.pod)).await,
            Command::Del(removal) => {
                self.forget(removal.container).await;
                Answer::Done { held: false }
            }
            Command::Gc { valid } => {
                for container in self.attachments.containers() {
                    if !valid.contains(&container) {
                        self.forget(container).await;
                    }
                }
                Answer::Done { held: false }
            }
            Command::Status => Answer::Done { held: false },
        }
    }

    /// Holds the pod until it is captured, or known not to be.
    async fn add(&self, attachment: protocol::Attachment, netns: File) -> Answer {
        let deadline = Instant::now() + HOLD;
        let (pod, container) = (key(&attachment.pod), attachment.container.clone());
        let id = match netns.metadata() {
            Ok(meta) => (meta.dev(), meta.ino()),
            Err(error) => return refused(&format!("the pod's network namespace: {error}"), false),
        };
        // First: an agent that is killed from here on finds the pod again.
        let (store, kept) = (self.store.clone(), attachment.clone());
        let keep = spawn_blocking(move || store.keep(&kept, &netns).map(|()| netns)).await;
        let namespace = match keep.map_err(io::Error::other).flatten() {
            Ok(namespace) => namespace,
            Err(error) => return refused(&format!("the pod cannot be remembered: {error}"), true),
        };
        let answer = if self.attachments.add(handed(attachment, namespace)).await {
            self.hold(&pod, &container, id, deadline).await
        } else {
            refused("the agent is ending", true)
        };
        if let Answer::Refused { message, .. } = &answer {
            info!(%pod, reason = %message, "a new pod does not start");
            self.forget(container).await;
        }
        answer
    }

    async fn hold(&self, pod: &WorkloadKey, container: &str, id: NetnsId, deadline: Instant) -> Answer {
        let verdict = timeout_at(deadline, self.attachments.verdict(container)).await.unwrap_or(Verdict::Unknown);
        match verdict {
            Verdict::Unknown => refused(
                "the Kubernetes API has not told the agent of this pod yet; see the kinds in `underpass status` on this node",
                true,
            ),
            Verdict::Outside => Answer::Done { held: false },
            Verdict::Impossible(reason) => refused(&reason, true),
            Verdict::Inside => match timeout_at(deadline, self.pods.settled(pod, id)).await {
                Ok(Ok(())) => Answer::Done { held: true },
                Ok(Err(reason)) => refused(&format!("the pod cannot be captured: {reason}"), true),
                Err(_) => refused("capturing the pod takes too long; see the agent's log on this node", true),
            },
        }
    }

    /// Is the pod as it has to be?
    async fn check(&self, container: &str, pod: &WorkloadKey) -> Answer {
        let known = self.attachments.containers().iter().any(|c| c == container);
        let verdict = if known {
            // It is there, or comes with the next snapshot.
            timeout(TRANSFER, self.attachments.verdict(container)).await.unwrap_or(Verdict::Unknown)
        } else {
            Verdict::Unknown
        };
        match (verdict, self.pods.state(pod)) {
            (Verdict::Inside | Verdict::Unknown, Some(Ok(()))) => Answer::Done { held: true },
            (Verdict::Outside, _) | (Verdict::Unknown, None) => Answer::Done { held: false },
            (_, Some(Err(reason))) | (Verdict::Impossible(reason), _) => refused(&reason, true),
            (Verdict::Inside, None) => refused("the pod is not captured", true),
        }
    }

    async fn forget(&self, container: String) {
        let (store, of) = (self.store.clone(), container.clone());
        let forgotten = spawn_blocking(move || store.forget(&of)).await.map_err(io::Error::other).flatten();
        if let Err(error) = forgotten {
            debug!(%container, %error, "forgetting a sandbox");
        }
        self.attachments.remove(container).await;
        self.pods.look_soon();
    }
}

fn refused(message: &str, retry: bool) -> Answer {
    Answer::Refused { message: message.to_owned(), retry }
}
