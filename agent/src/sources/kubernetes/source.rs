//! The owner of everything that is known: takes in changes, compiles, publishes, keeps a copy.

use std::{
    future::pending,
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
    time::{Instant as TokioInstant, sleep_until},
};
use tracing::{info, warn};

use super::{
    KubernetesConfig,
    cluster::{Change, Cluster},
    compile::{Compiled, Compiler},
    finder::Finder,
    names::NOT_HEADLESS,
    read::Reader,
    saved,
    status::{Kind, Statuses},
    watch::{QUEUE, Seen, Selection, follow},
};
use crate::mesh::{MeshStore, Snapshot};

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
        let client = Client::try_from(client).map_err(|e| SourceError::Client(e.to_string()))?;
        Ok(Self {
            client,
            node: node.into(),
            state_dir: state_dir.to_owned(),
            statuses: Statuses::default(),
            compiler: Compiler::new(Finder::new(pods), &config.cluster_domain),
        })
    }

    /// How it is doing.
    pub fn statuses(&self) -> Statuses {
        self.statuses.clone()
    }

    /// Follows the API server and puts snapshots into `store` until dropped. Name, trust domain and settings are those of the
    /// snapshot in `base`, which may change.
    pub async fn run(self, base: Arc<MeshStore>, store: Arc<MeshStore>) {
        let Self { client, node, state_dir, statuses, compiler } = self;
        let mut owner = Owner::new(&node, state_dir, statuses.clone(), compiler).await;
        let (sender, mut changes) = mpsc::channel(QUEUE);
        let mut watches = JoinSet::new();
        watch(&mut watches, &client, &node, &statuses, &sender);
        drop(sender);
        let mut settings = base.subscribe();
        loop {
            let wake = owner.wake();
            tokio::select! {
                change = changes.recv() => {
                    let Some(change) = change else { return };
                    owner.take(change);
                    // What is there already belongs to the same moment.
                    while let Ok(change) = changes.try_recv() {
                        owner.take(change);
                    }
                }
                Ok(()) = settings.changed() => owner.changed(),
                () = until(wake) => {}
            }
            owner = owner.act(&base, &store).await;
        }
    }
}

async fn until(wake: Option<Instant>) {
    match wake {
        Some(at) => sleep_until(TokioInstant::from_std(at)).await,
        None => pending().await,
    }
}

/// Starts a watch for every kind. Selectors keep from this node what it does not need.
fn watch(watches: &mut JoinSet<()>, client: &Client, node: &str, statuses: &Statuses, changes: &mpsc::Sender<Change>) {
    let pods = Selection {
        // A pod that has ended has no address any more.
        fields: Some("status.phase!=Succeeded,status.phase!=Failed".into()),
        ..Selection::all(Kind::Pod, &["v1"])
    };
    let nodes = Selection { fields: Some(format!("metadata.name={node}")), ..Selection::all(Kind::Node, &["v1"]) };
    let slices = Selection { labels: Some(NOT_HEADLESS), ..Selection::all(Kind::EndpointSlice, &["v1", "v1beta1"]) };
    let istio = |kind| Selection::all(kind, &["v1", "v1beta1"]);
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
    changes: &mpsc::Sender<Change>,
    change: fn(Seen<T>) -> Change,
) where
    T: kube::Resource<DynamicType = kube::api::ApiResource>
        + Clone
        + serde::de::DeserializeOwned
        + std::fmt::Debug
        + Send
        + 'static,
{
    watches.spawn(follow(client.clone(), selection, statuses.clone(), changes.clone(), change));
}

/// What is known, and what is to be done about it.
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
}

impl Owner {
    async fn new(node: &Arc<str>, state_dir: PathBuf, statuses: Statuses, compiler: Compiler) -> Self {
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
        }
    }

    fn take(&mut self, change: Change) {
        if self.cluster.take(&mut self.reader, change) {
            self.changed();
            self.unsaved = true;
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
        let changed = self.dirty.map(|since| since + SETTLE);
        let look = self.look.map(|(at, _)| at);
        let wanted = [changed, self.due, look].into_iter().flatten().min()?;
        Some(wanted.max(self.compilable()?))
    }

    fn save_at(&self) -> Option<Instant> {
        (self.unsaved && self.cluster.synced()).then(|| self.saved.map_or(self.started, |saved| saved + SAVE))
    }

    /// When there is something to do although nothing happens.
    fn wake(&self) -> Option<Instant> {
        [self.compile_at(), self.save_at()].into_iter().flatten().min()
    }

    /// Does what is due.
    async fn act(mut self, base: &Arc<MeshStore>, store: &Arc<MeshStore>) -> Self {
        let now = Instant::now();
        if self.compile_at().is_some_and(|at| at <= now) {
            self = self.compile(base, store).await;
        }
        if self.save_at().is_some_and(|at| at <= now) {
            self = self.save().await;
        }
        self
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
        let Compiled { snapshot, problems, due, complete } = compiled;
        let synced = self.cluster.synced();
        self.statuses.compiled(self.cluster.counts(), !synced, problems);
        self.due = due;
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
        publish(store, snapshot, self.published);
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
