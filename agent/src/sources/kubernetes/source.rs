//! The owner of everything that is known: takes in changes, compiles, publishes, keeps a copy.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{
    sync::mpsc,
    task::{JoinSet, spawn_blocking},
};
use tracing::{info, warn};

use super::{
    KubernetesConfig,
    attachments::{Attached, Attachment, Attachments, Board, Verdict},
    cluster::{Change, Cluster, News},
    compile::{Compiled, Compiler},
    enrolment::{Wish, wish},
    finder::Finder,
    leaving::{self, Leaving},
    names::NOT_HEADLESS,
    pods::{cluster_scoped, workload_key},
    projection::Projector,
    read::Reader,
    records::Key,
    saved,
    status::{Kind, Statuses},
    watch::{QUEUE, Seen, Selection, follow},
};
use crate::{
    mesh::{MeshStore, Snapshot},
    until::until,
};

/// How long the API server has at the start before what was known when the agent last ran is used.
const RESTORE_AFTER: Duration = Duration::from_secs(3);
/// After a change, how long others are waited for. Bounds how often snapshots are made while changes do not end.
const SETTLE: Duration = Duration::from_millis(20);
/// First and longest pause before pods that were not found are looked for again.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Shortest time between two copies on disk.
const SAVE: Duration = Duration::from_secs(30);

/// Why the source cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is no way to the API server.
    #[error("kubernetes.kubeconfig: {path}: {reason}; name a kubeconfig file that the agent can read")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Not in a pod, and no file is named.
    #[error(
        "kubernetes: no kubeconfig is named and this is no pod with a service account ({0}); set kubernetes.kubeconfig, or mount the service account's token"
    )]
    InCluster(String),
    /// The client cannot be made.
    #[error("kubernetes: {0}")]
    Client(String),
}

/// The source.
pub struct KubernetesSource {
    client: Client,
    node: Arc<str>,
    state_dir: PathBuf,
    statuses: Statuses,
    compiler: Compiler,
    news: (mpsc::Sender<News>, mpsc::Receiver<News>),
    board: Board,
    projector: Option<Projector>,
    notice: Option<(String, String)>,
    leaving: Arc<Leaving>,
    attached: Vec<Attachment>,
}

impl KubernetesSource {
    /// Prepares the source for the node of this name; asks nobody yet. `pods` is the cgroup directory above the pods', and
    /// `state_dir` where the last good copy is.
    pub async fn new(
        config: &KubernetesConfig,
        node: &str,
        pods: &Path,
        state_dir: &Path,
    ) -> Result<Self, SourceError> {
        let mut client = match &config.kubeconfig {
            Some(path) => {
                let failed = |reason: String| SourceError::Kubeconfig { path: path.clone(), reason };
                let file = Kubeconfig::read_from(path).map_err(|e| failed(e.to_string()))?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                    .await
                    .map_err(|e| failed(e.to_string()))?
            }
            None => Config::incluster().map_err(|e| SourceError::InCluster(e.to_string()))?,
        };
        client.connect_timeout = Some(Duration::from_secs(5));
        // The client's own retries say nothing of what is wrong, and pause for minutes in the end; watches have theirs.
        client.default_retry = false;
        let client = Client::try_from(client).map_err(|e| SourceError::Client(e.to_string()))?;
        Ok(Self {
            client,
            node: node.into(),
            state_dir: state_dir.to_owned(),
            statuses: Statuses::default(),
            compiler: Compiler::new(Finder::new(pods), &config.cluster_domain),
            news: mpsc::channel(QUEUE),
            board: Board::default(),
            projector: None,
            notice: None,
            leaving: Arc::default(),
            attached: Vec::new(),
        })
    }

    /// Keeps a file that tells the CNI plugin which namespaces' pods it must not let start without this agent.
    #[must_use]
    pub fn with_projection(mut self, file: PathBuf) -> Self {
        self.projector = Some(Projector::new(file));
        self
    }

    /// Un-enrols every pod, for good, when this `ConfigMap` (namespace, name) asks for it.
    #[must_use]
    pub fn with_notice(mut self, namespace: String, name: String) -> Self {
        self.notice = Some((namespace, name));
        self
    }

    /// Knows these pods, which were handed to earlier agents, before anything else is known: no snapshot is without them.
    #[must_use]
    pub fn with_attached(mut self, attached: Vec<Attachment>) -> Self {
        self.attached = attached;
        self
    }

    /// For handing over pods that do not run yet.
    pub fn attachments(&self) -> Attachments {
        Attachments::new(self.news.0.clone(), self.board.clone())
    }

    /// The way to the API server.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Whether everything is being un-enrolled.
    pub fn leaving(&self) -> Arc<Leaving> {
        Arc::clone(&self.leaving)
    }

    /// How it is doing.
    pub fn statuses(&self) -> Statuses {
        self.statuses.clone()
    }

    /// Follows the API server and puts snapshots into `store` until dropped. Name, trust domain and settings are those of the
    /// snapshot in `base`, which may change.
    pub async fn run(self, base: Arc<MeshStore>, store: Arc<MeshStore>) {
        let Self { client, node, state_dir, statuses, compiler, news, board, projector, notice, leaving, attached } =
            self;
        let outside = Outside { board, projector, leaving };
        let mut owner = Owner::new(&node, state_dir, statuses.clone(), compiler, outside).await;
        for attachment in attached {
            owner.outside.board.expect(&attachment);
            owner.take(News::Attached(attachment));
        }
        let (sender, mut news) = news;
        let mut watches = JoinSet::new();
        watch(&mut watches, &client, &node, &owner.cluster, &statuses, &sender);
        if let Some((namespace, name)) = notice {
            watches.spawn(leaving::follow(client.clone(), namespace, name, sender.clone()));
        }
        drop(sender);
        let mut settings = base.subscribe();
        loop {
            let wake = owner.wake();
            tokio::select! {
                first = news.recv() => {
                    let Some(first) = first else { return };
                    owner.take(first);
                    // What is there already belongs to the same moment.
                    while let Ok(next) = news.try_recv() {
                        owner.take(next);
                    }
                }
                Ok(()) = settings.changed() => owner.changed(),
                () = until(wake) => {}
            }
            owner = owner.act(&base, &store).await;
        }
    }
}

/// Starts a watch for every kind. Selectors keep from this node what it does not need. `copy` is
/// what is known before.
fn watch(
    watches: &mut JoinSet<()>,
    client: &Client,
    node: &str,
    copy: &Cluster,
    statuses: &Statuses,
    changes: &mpsc::Sender<News>,
) {
    let known = |kind| copy.listed().any(|of| of == kind);
    let pods = Selection {
        // A pod that has ended has no address any more.
        fields: Some("status.phase!=Succeeded,status.phase!=Failed".into()),
        ..Selection::all(Kind::Pod, &["v1"])
    };
    let nodes = Selection { fields: Some(format!("metadata.name={node}")), ..Selection::all(Kind::Node, &["v1"]) };
    let versions = &["v1", "v1beta1"];
    let slices = Selection {
        labels: Some(NOT_HEADLESS),
        known: known(Kind::EndpointSlice),
        ..Selection::all(Kind::EndpointSlice, versions)
    };
    let istio = |kind| Selection { known: known(kind), ..Selection::all(kind, versions) };
    follow_as(watches, client, pods, statuses, changes, Change::Pod);
    follow_as(watches, client, Selection::all(Kind::Namespace, &["v1"]), statuses, changes, Change::Namespace);
    follow_as(watches, client, nodes, statuses, changes, Change::Node);
    follow_as(watches, client, Selection::all(Kind::Service, &["v1"]), statuses, changes, Change::Service);
    follow_as(watches, client, slices, statuses, changes, Change::Slice);
    follow_as(watches, client, istio(Kind::AuthorizationPolicy), statuses, changes, Change::Policy);
    follow_as(watches, client, istio(Kind::PeerAuthentication), statuses, changes, Change::Authentication);
}

fn follow_as<T>(
    watches: &mut JoinSet<()>,
    client: &Client,
    selection: Selection,
    statuses: &Statuses,
    changes: &mpsc::Sender<News>,
    change: fn(Seen<T>) -> Change,
) where
    T: kube::Resource<DynamicType = kube::api::ApiResource>
        + Clone
        + serde::de::DeserializeOwned
        + std::fmt::Debug
        + Send
        + 'static,
{
    let news = move |seen| News::Change(change(seen));
    watches.spawn(follow(client.clone(), selection, statuses.clone(), changes.clone(), news));
}

/// What is known, and what is to be done about it.
#[expect(clippy::struct_excessive_bools, reason = "they are independent of each other")]
struct Owner {
    node: Arc<str>,
    state_dir: PathBuf,
    statuses: Statuses,
    reader: Reader,
    cluster: Cluster,
    compiler: Compiler,
    started: Instant,
    /// The cluster was read from the last good copy.
    restored: bool,
    published: bool,
    /// Since when something is different from what is published.
    dirty: Option<Instant>,
    /// When pods change without anybody saying so.
    due: Option<Instant>,
    /// When pods that were not found are looked for, and how long that is after the last time.
    look: Option<(Instant, Duration)>,
    saved: Option<Instant>,
    unsaved: bool,
    /// A pod's start is held up: no waiting for further changes.
    urgent: bool,
    outside: Outside,
}

/// Who hears of what the owner does, beside the readers of snapshots.
struct Outside {
    board: Board,
    projector: Option<Projector>,
    leaving: Arc<Leaving>,
}

impl Owner {
    async fn new(
        node: &Arc<str>,
        state_dir: PathBuf,
        statuses: Statuses,
        compiler: Compiler,
        outside: Outside,
    ) -> Self {
        let (of, directory) = (Arc::clone(node), state_dir.clone());
        let restored = spawn_blocking(move || saved::restore(&directory, &of)).await.expect("reading does not panic");
        let cluster = restored.inspect_err(|e| {
            if e.kind() != std::io::ErrorKind::NotFound {
                warn!(error = %e, "the last good copy of the cluster is not used");
            }
        });
        let now = Instant::now();
        Self {
            node: Arc::clone(node),
            reader: Reader::new(node),
            restored: cluster.is_ok(),
            cluster: cluster.unwrap_or_default(),
            state_dir,
            statuses,
            compiler,
            started: now,
            published: false,
            dirty: Some(now),
            due: None,
            look: None,
            saved: None,
            unsaved: false,
            urgent: false,
            outside,
        }
    }

    fn take(&mut self, news: News) {
        match news {
            News::Change(change) => {
                // Pods' labels and namespaces' are what it is made of.
                let projected = matches!(change, Change::Pod(_) | Change::Namespace(_));
                if self.cluster.take(&mut self.reader, change) {
                    self.changed();
                    self.unsaved = true;
                    if let Some(projector) = self.outside.projector.as_mut().filter(|_| projected) {
                        projector.changed();
                    }
                }
            }
            News::Attached(attachment) => {
                let (key, attached, namespace) = Attached::of(attachment);
                if let Err(error) = self.compiler.finder().hand(&key, attached.uid.as_deref(), namespace) {
                    warn!(pod = %key, %error, "its network namespace was handed over and cannot be used");
                }
                self.cluster.attach(&key, attached);
                self.changed();
                self.urgent = true;
            }
            News::Detached(container) => {
                if let Some(key) = self.cluster.detach(&container) {
                    self.compiler.finder().take_back(&key);
                    self.changed();
                }
            }
            News::Leaving(leaving) => {
                if std::mem::replace(&mut self.cluster.leaving, leaving) != leaving {
                    info!(leaving, "asked whether to un-enrol everything");
                    self.changed();
                    if let Some(projector) = &mut self.outside.projector {
                        projector.changed();
                    }
                }
            }
        }
    }

    fn changed(&mut self) {
        self.dirty.get_or_insert_with(Instant::now);
    }

    /// When the cluster can be compiled: it is known, or it was known once and nobody answers.
    fn compilable(&self) -> Option<Instant> {
        if self.cluster.synced() || self.published {
            return Some(self.started);
        }
        self.restored.then(|| self.started + RESTORE_AFTER)
    }

    /// When the next snapshot is to be made.
    fn compile_at(&self) -> Option<Instant> {
        let changed = self.dirty.map(|since| if self.urgent { since } else { since + SETTLE });
        let look = self.look.map(|(at, _)| at);
        let wanted = [changed, self.due, look].into_iter().flatten().min()?;
        Some(wanted.max(self.compilable()?))
    }

    fn save_at(&self) -> Option<Instant> {
        // Kinds that are not in sync are what the copy had of them.
        let whole = self.cluster.synced() || (self.restored && self.published);
        (self.unsaved && whole).then(|| self.saved.map_or(self.started, |saved| saved + SAVE))
    }

    /// When there is something to do although nothing happens.
    fn wake(&self) -> Option<Instant> {
        [self.compile_at(), self.save_at(), self.project_at()].into_iter().flatten().min()
    }

    /// When the projection is to be written.
    fn project_at(&self) -> Option<Instant> {
        let synced = self.cluster.namespaces.synced() && self.cluster.pods.synced();
        self.outside.projector.as_ref().filter(|_| synced).and_then(Projector::due)
    }

    /// Does what is due.
    async fn act(mut self, base: &Arc<MeshStore>, store: &Arc<MeshStore>) -> Self {
        let now = Instant::now();
        if self.compile_at().is_some_and(|at| at <= now) {
            self = self.compile(base, store).await;
        }
        if self.project_at().is_some_and(|at| at <= now)
            && let Some(projector) = &mut self.outside.projector
        {
            projector.write(&self.cluster);
        }
        if self.save_at().is_some_and(|at| at <= now) {
            self = self.save().await;
        }
        self
    }

    /// Tells whoever holds up a pod how it stands now.
    fn tell(&self, snapshot: &Snapshot) {
        if self.cluster.attached.is_empty() {
            return;
        }
        let verdicts = self.cluster.attached.iter();
        self.outside.board.say(
            verdicts
                .map(|(key, attached)| (attached.container.clone(), verdict(&self.cluster, snapshot, key, attached))),
        );
    }

    async fn compile(mut self, base: &Arc<MeshStore>, store: &Arc<MeshStore>) -> Self {
        let news = self.dirty.take().is_some();
        let base = base.load();
        let (owner, compiled) = spawn_blocking(move || {
            let compiled = self.compiler.compile(&mut self.cluster, &base);
            (self, compiled)
        })
        .await
        .expect("compiling does not panic");
        self = owner;
        let Compiled { snapshot, problems, due, complete, disputed } = compiled;
        let synced = self.cluster.synced();
        self.statuses.compiled(self.cluster.counts(), !synced, disputed, problems);
        self.due = due;
        self.urgent = false;
        self.look = (!complete).then(|| {
            // A pod that is new has its processes soon.
            let last = self.look.filter(|_| !news);
            let pause = last.map_or(LOOK_AGAIN.0, |(_, pause)| (pause * 2).min(LOOK_AGAIN.1));
            (Instant::now() + pause, pause)
        });
        if !self.published {
            info!(
                from_last_good = !synced,
                pods = self.cluster.pods.len(),
                services = self.cluster.services.len(),
                "the cluster is known"
            );
        }
        let left = self.cluster.leaving && self.due.is_none() && snapshot.local_workloads().next().is_none();
        publish(store, snapshot, self.published);
        self.tell(&store.load());
        self.outside.leaving.say(self.cluster.leaving, left);
        self.published = true;
        self
    }

    /// Keeping the copy is a convenience for the next start: failing to must not stop this one.
    async fn save(mut self) -> Self {
        self.unsaved = false;
        self.saved = Some(Instant::now());
        let (owner, saved) = spawn_blocking(move || {
            let saved = saved::save(&self.state_dir, &self.node, &self.cluster);
            (self, saved)
        })
        .await
        .expect("writing does not panic");
        self = owner;
        if let Err(error) = saved {
            warn!(%error, directory = %self.state_dir.display(), "the last good copy of the cluster could not be written; a start without the API server would use an older one or wait");
        }
        self
    }
}

/// A snapshot that says what is said already wakes nobody.
fn publish(store: &MeshStore, snapshot: Snapshot, published: bool) {
    if !published || !store.load().says_the_same(&snapshot) {
        store.replace(snapshot);
    }
}

/// How a pod that was handed over stands, now that there is a snapshot with it or without it.
fn verdict(cluster: &Cluster, snapshot: &Snapshot, key: &Key, attached: &Attached) -> Verdict {
    let Some(record) = cluster.pods.get(key).filter(|record| attached.is(record)) else {
        return Verdict::Unknown;
    };
    // Whatever its namespace says.
    if record.unvouched.is_some() {
        return Verdict::Outside;
    }
    let namespace = cluster.namespaces.get(&cluster_scoped(&key.namespace));
    if namespace.is_none() && record.choice.is_none() {
        return Verdict::Unknown;
    }
    if cluster.leaving || wish(record, namespace.map(Arc::as_ref)) == Wish::Out {
        return Verdict::Outside;
    }
    match snapshot.workload(&workload_key(key)) {
        Some(workload) if workload.local.is_some() => Verdict::Inside,
        _ if record.addresses.is_empty() => Verdict::Impossible(
            "it has no address; is a plugin before underpass-cni in the chain that gives it one?".to_owned(),
        ),
        _ => Verdict::Impossible(format!(
            "it cannot be taken into the mesh; `underpass status` on node {} says why",
            snapshot.node
        )),
    }
}
