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

use super::status::{Kind, Statuses};

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
    /// The API server does not know the kind.
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
}

impl Selection {
    pub(super) fn all(kind: Kind, versions: &'static [&'static str]) -> Self {
        Self { kind, versions, fields: None, labels: None }
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
    loop {
        let Some(resource) = served(&client, &selection, &statuses).await else {
            if statuses.absent(kind) {
                info!(?kind, "the API server does not know it; looking again from time to time");
            }
            if changes.send(change(Seen::Absent)).await.is_err() {
                return;
            }
            sleep(ABSENT).await;
            continue;
        };
        statuses.serving(kind, &resource.api_version);
        let api = Api::<T>::all_with(client.clone(), &resource);
        let mut events = pin!(watcher(api, selection.config()).backoff(ExponentialBackoff::from(pauses())));
        loop {
            let seen = match events.try_next().await {
                Ok(Some(Event::Apply(object))) => Seen::Applied(object),
                Ok(Some(Event::Delete(object))) => Seen::Deleted(object),
                Ok(Some(Event::Init)) => Seen::ListBegins,
                Ok(Some(Event::InitApply(object))) => Seen::Listed(object),
                Ok(Some(Event::InitDone)) => Seen::ListEnds,
                Ok(None) => break,
                Err(error) => {
                    statuses.failed(kind, &error.to_string());
                    if is_expired(&error) && expired.is_none_or(|at| at.elapsed() > EXPIRED) {
                        // Not after the pause that was due for what came before it.
                        expired = Some(Instant::now());
                        break;
                    }
                    if is_unknown(&error) {
                        // The kind was there, so what is known of it stays: an API that is taken away deletes its objects first.
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

/// The version to read; `None` when the API server answers that it has none of them.
async fn served(client: &Client, selection: &Selection, statuses: &Statuses) -> Option<ApiResource> {
    let (group, _, plural) = selection.kind.names();
    if group.is_empty() {
        return selection.versions.first().map(|v| selection.resource(v));
    }
    let mut pauses = pauses().build();
    'again: loop {
        for version in selection.versions {
            match client.list_api_group_resources(&format!("{group}/{version}")).await {
                Ok(list) if list.resources.iter().any(|r| r.name == plural) => {
                    return Some(selection.resource(version));
                }
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => {
                    statuses.failed(selection.kind, &error.to_string());
                    sleep(pauses.next().unwrap_or(ABSENT)).await;
                    continue 'again;
                }
            }
        }
        return None;
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
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 404
    )
}
