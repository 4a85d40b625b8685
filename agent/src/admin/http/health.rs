//! Port 15021: what the kubelet asks.

use std::{
    fmt::Write as _,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio::time::{MissedTickBehavior, interval};
use tracing::error;

use super::{View, refuse};
use crate::{
    proxy::{PodState, PodStatus},
    telemetry::logging::printable,
};

/// A relay thread's round of work takes milliseconds (512 events, half a mebibyte each); one that takes this long will not end.
pub(super) const STUCK: Duration = Duration::from_secs(15);
/// How often the threads are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Most names in an explanation.
const NAMED: usize = 5;

/// Whether the agent can serve, from the moment on when it can be asked.
#[derive(Default)]
pub struct Health {
    view: OnceLock<View>,
    /// Why it does not serve any more, for good.
    left: OnceLock<&'static str>,
}

/// One thing that has to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) name: &'static str,
    pub(super) ready: bool,
    /// How it stands, for people.
    pub(super) detail: String,
}

impl Health {
    /// Not ready from now on, whatever the conditions.
    pub fn leave(&self, why: &'static str) {
        // The first reason stays.
        let _ = self.left.set(why);
    }

    /// Whether new pods may rely on this agent, with how everything stands.
    pub fn readiness(&self) -> Result<String, String> {
        if let Some(why) = self.left.get() {
            return Err((*why).to_owned());
        }
        let Some(view) = self.view.get() else {
            return Err("bpf: not ready: the agent is starting".to_owned());
        };
        let mut text = String::new();
        let mut ready = true;
        for condition in conditions(view) {
            let state = if condition.ready { "ok" } else { "not ready" };
            ready &= condition.ready;
            let _ = writeln!(text, "{}: {state}: {}", condition.name, printable(&condition.detail));
        }
        if ready { Ok(text) } else { Err(text) }
    }

    /// Everything is in place: conditions are judged from now on. Runs until it is dropped.
    pub async fn watch(self: Arc<Self>, view: View) {
        let view = self.view.get_or_init(|| view);
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said = false;
        loop {
            ticks.tick().await;
            let (live, text) = live(view);
            if !live && !said {
                error!(what = text.trim_end(), "relay threads do not go on");
            }
            said = !live;
        }
    }
}

/// The routes.
pub fn router(health: Arc<Health>) -> Router {
    Router::new()
        .route("/healthz/ready", get(ready))
        .route("/healthz/live", get(alive))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "there are /healthz/ready and /healthz/live"))
        .with_state(health)
}

async fn ready(State(health): State<Arc<Health>>) -> Response {
    match health.readiness() {
        Ok(text) => text.into_response(),
        Err(text) => refuse(StatusCode::SERVICE_UNAVAILABLE, text.trim_end()),
    }
}

async fn alive(State(health): State<Arc<Health>>) -> Response {
    let (live, text) =
        health.view.get().filter(|_| health.left.get().is_none()).map_or((true, "starting\n".to_owned()), live);
    (if live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text).into_response()
}

fn live(view: &View) -> (bool, String) {
    let mut text = String::new();
    for (number, thread) in view.node.relay().iter().enumerate() {
        if thread.ended {
            let _ = writeln!(text, "relay thread {number} has ended");
        } else if thread.stuck >= STUCK {
            let (seconds, connections) = (thread.stuck.as_secs(), thread.connections);
            let _ = writeln!(text, "relay thread {number} is stuck for {seconds} s, with {connections} connections");
        }
    }
    if text.is_empty() { (true, "ok\n".to_owned()) } else { (false, text) }
}

/// What has to be there before new pods may rely on this agent. A single pod or identity in trouble is told, and does not make the node
/// unready: the others work.
pub(super) fn conditions(view: &View) -> [Condition; 4] {
    let applied = view.node.applied();
    let reload = view.node.reload();
    let generation = view.mesh.load().generation;
    let configuration = Condition {
        name: "configuration",
        ready: generation > 0,
        detail: match (generation, &reload.error) {
            (0, None) => "none has been read yet".to_owned(),
            (n, None) if reload.from_last_good => format!("generation {n}, the last good copy"),
            (n, None) => format!("generation {n}"),
            (n, Some(error)) => format!("generation {n}; the file as it is now is refused: {error}"),
        },
    };
    let bpf = Condition {
        name: "bpf",
        ready: applied.error.is_none() && applied.generation > 0,
        detail: match &applied.error {
            Some(error) => error.clone(),
            None => match view.node.capture_problems().as_slice() {
                [] => format!("the maps have generation {}", applied.generation),
                [first, rest @ ..] => format!(
                    "the maps have generation {}, more strictly than it is written ({} more in the status): {first}",
                    applied.generation,
                    rest.len()
                ),
            },
        },
    };
    [configuration, certificates(view), bpf, listeners(&view.node.pods(), applied.generation > 0)]
}

fn certificates(view: &View) -> Condition {
    let (wanted, current, now) = (view.certificates.wanted(), view.certificates.all(), SystemTime::now());
    let missing: Vec<String> = wanted
        .iter()
        .filter(|id| current.get(id).is_none_or(|svid| !svid.valid_at(now)))
        .map(ToString::to_string)
        .collect();
    // Without an identity to issue for it would not be noticed, and the first pod would be without.
    if let Some(lacks) = view.certificates.lacks().filter(|_| wanted.is_empty()) {
        return Condition { name: "certificates", ready: false, detail: lacks };
    }
    Condition {
        name: "certificates",
        ready: wanted.is_empty() || missing.len() < wanted.len(),
        detail: summary(wanted.len(), "identities have a certificate", &missing),
    }
}

fn listeners(pods: &[PodStatus], applied: bool) -> Condition {
    // A kept pod is closed on purpose: the others do not depend on it.
    let wanted = pods.iter().filter(|pod| !matches!(pod.state, PodState::Kept { .. })).count();
    let refused: Vec<String> = pods
        .iter()
        .filter_map(|pod| match &pod.state {
            PodState::Enrolled { .. } | PodState::Kept { .. } => None,
            PodState::Refused { reason } => Some(format!("{} ({reason})", pod.key)),
        })
        .collect();
    Condition {
        name: "listeners",
        ready: applied && (wanted == 0 || refused.len() < wanted),
        detail: summary(wanted, "pods have listeners", &refused),
    }
}

/// `3 of 5 pods have listeners; not: a, b`
fn summary(total: usize, what: &str, missing: &[String]) -> String {
    let mut text = format!("{} of {total} {what}", total - missing.len());
    if let [first, rest @ ..] = missing {
        let _ = write!(text, "; not: {first}");
        for name in rest.iter().take(NAMED - 1) {
            let _ = write!(text, ", {name}");
        }
        if missing.len() > NAMED {
            let _ = write!(text, " and {} more", missing.len() - NAMED);
        }
    }
    text
}
