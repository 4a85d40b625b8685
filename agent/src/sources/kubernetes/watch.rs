//! Follows one kind of object at the API server: list, watch, and again after whatever goes wrong.

use std::{
    fmt::Debug,
    pin::pin,
    time::{Duration, Instant},
};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::TryStreamExt as _;
use kube::{
    Api, Client, Resource,
    api::ApiResource,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, ExponentialBackoff, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, time::sleep};
use tracing::info;

use super::{
    presence::{Presence, Verdict, look},
    status::{Kind, Statuses},
};

/// Longest that one watch lasts. A connection that died silently is noticed at the latest then.
const WATCH: Duration = Duration::from_mins(2);
/// Objects in one page of a list: bounds what is in memory twice.
const PAGE: u32 = 500;
/// Events that wait for the owner of the state; a full queue holds the watches up.
pub(super) const QUEUE: usize = 1024;
/// How often a kind that the API server does not know is asked for again.
const ABSENT: Duration = Duration::from_secs(10);
/// The first pause after a failure, and the longest but for chance, which doubles it at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// A watch that has missed too much begins anew with a list: at once, but no more often than this.
const EXPIRED: Duration = Duration::from_mins(1);

/// What a watch says about objects as they came.
pub(super) enum Seen<T> {
    /// It is there.
    Applied(T),
    /// It is gone.
    Deleted(T),
    /// A list begins.
    ListBegins,
    /// Part of the list.
    Listed(T),
    /// The list is complete.
    ListEnds,
    /// There is nothing of this kind, which is certain: see [`Presence`].
    Absent,
}

/// What to follow.
#[derive(Debug, Clone)]
pub(super) struct Selection {
    pub(super) kind: Kind,
    /// Versions that can be read, the preferred one first.
    pub(super) versions: &'static [&'static str],
    pub(super) fields: Option<String>,
    pub(super) labels: Option<&'static str>,
    /// The last good copy says that this kind exists.
    pub(super) known: bool,
}

impl Selection {
    pub(super) fn all(kind: Kind, versions: &'static [&'static str]) -> Self {
        Self { kind, versions, fields: None, labels: None, known: false }
    }

    fn resource(&self, version: &str) -> ApiResource {
        let (group, kind, plural) = self.kind.names();
        let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version,
            kind: kind.to_owned(),
            plural: plural.to_owned(),
        }
    }

    fn config(&self) -> watcher::Config {
        let mut config = watcher::Config::default().timeout(WATCH.as_secs() as u32).page_size(PAGE);
        config.field_selector.clone_from(&self.fields);
        config.label_selector = self.labels.map(ToOwned::to_owned);
        config
    }
}

/// Follows until the receiver is gone. Never gives up: whatever fails is tried again after a growing pause.
pub(super) async fn follow<T, C>(
    client: Client,
    selection: Selection,
    statuses: Statuses,
    changes: mpsc::Sender<C>,
    change: impl Fn(Seen<T>) -> C + Send,
) where
    T: Resource<DynamicType = ApiResource> + Clone + DeserializeOwned + Debug + Send + 'static,
    C: Send,
{
    let kind = selection.kind;
    let mut expired: Option<Instant> = None;
    let mut presence = Presence::new(kind, selection.known);
    loop {
        let Some(version) = served(&client, &selection, &mut presence, &statuses).await else {
            if statuses.absent(kind) {
                info!(?kind, "the API server does not know it; looking again from time to time");
            }
            if changes.send(change(Seen::Absent)).await.is_err() {
                return;
            }
            sleep(ABSENT).await;
            continue;
        };
        let resource = selection.resource(version);
        statuses.serving(kind, &resource.api_version);
        let api = Api::<T>::all_with(client.clone(), &resource);
        let mut events = pin!(watcher(api, selection.config()).backoff(ExponentialBackoff::from(pauses())));
        loop {
            let seen = match events.try_next().await {
                Ok(Some(Event::Apply(object))) => Seen::Applied(object),
                Ok(Some(Event::Delete(object))) => Seen::Deleted(object),
                Ok(Some(Event::Init)) => Seen::ListBegins,
                Ok(Some(Event::InitApply(object))) => Seen::Listed(object),
                Ok(Some(Event::InitDone)) => {
                    presence.listed(version);
                    Seen::ListEnds
                }
                Ok(None) => break,
                Err(error) => {
                    statuses.failed(kind, &error.to_string());
                    if is_expired(&error) && expired.is_none_or(|at| at.elapsed() > EXPIRED) {
                        // Not after the pause that was due for what came before it.
                        expired = Some(Instant::now());
                        break;
                    }
                    if is_unknown(&error) {
                        // What is known of it stays in force: see `Presence`.
                        sleep(ABSENT).await;
                        break;
                    }
                    continue;
                }
            };
            statuses.heard(kind);
            if changes.send(change(seen)).await.is_err() {
                return;
            }
        }
    }
}

/// The version to read; `None` when there is nothing of the kind. Until one of both is certain,
/// what is known stays in force and the reason is in the status.
async fn served(
    client: &Client,
    selection: &Selection,
    presence: &mut Presence,
    statuses: &Statuses,
) -> Option<&'static str> {
    let mut pauses = pauses().build();
    loop {
        let looked = look(client, selection.kind, &presence.order(selection.versions)).await;
        match presence.judge(looked, Instant::now()) {
            Verdict::Read(version) => return Some(version),
            Verdict::Nothing => return None,
            Verdict::Keep(reason) => statuses.failed(selection.kind, &reason),
        }
        sleep(pauses.next().unwrap_or(ABSENT).min(ABSENT)).await;
    }
}

/// How long to wait after one failure, and the next.
fn pauses() -> ExponentialBuilder {
    ExponentialBuilder::new().with_min_delay(PAUSE.0).with_max_delay(PAUSE.1).with_jitter().without_max_times()
}

/// The API server does not have everything any more that has happened since.
fn is_expired(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchError(status) if status.code == 410)
}

fn is_unknown(error: &watcher::Error) -> bool {
    matches!(
        error,
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        // A watch that cannot start because it has missed too much would be started again from the
        // same moment.
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) if matches!(status.code, 404 | 410)
    )
}
