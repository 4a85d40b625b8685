//! Port 15000: for operators on the node.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Query, Request, State, rejection::QueryRejection},
    http::{
        HeaderMap, StatusCode,
        header::{HOST, ORIGIN},
        uri::Authority,
    },
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use serde::Deserialize;
use tokio::sync::{Notify, Semaphore};
use tracing::info;

use super::{View, answer, config_dump, refuse};
use crate::telemetry::logging::{self, printable};

/// Longest filter that is taken, in bytes.
const MAX_FILTER: usize = 4096;

const INDEX: &str = "GET  /config_dump          everything the agent knows, as istioctl ztunnel-config reads it
GET  /logging              the log's filter
POST /logging?level=LEVEL  replaces it: a level (debug), or targets (info,underpass::tunnel=debug)
POST /logging?reset        puts back the one from the start
POST /quitquitquit         ends the agent as SIGTERM does
";

#[derive(Clone)]
struct Admin {
    view: View,
    quit: Arc<Notify>,
}

/// The routes. `quit` is told when the agent is to end.
pub fn router(view: View, quit: Arc<Notify>) -> Router {
    Router::new()
        .route("/", get(async || INDEX))
        .route("/config_dump", get(dump))
        .route("/logging", get(filter).post(set_filter))
        .route("/quitquitquit", post(end))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "no such resource; GET / lists them"))
        .layer(middleware::from_fn(from_tools_only))
        .with_state(Admin { view, quit })
}

/// Whoever is on the node may ask, web pages that somebody on it looks at may not: neither with a request from a foreign page, nor with
/// a foreign name that leads here.
async fn from_tools_only(request: Request, next: Next) -> Response {
    if is_foreign(request.headers()) {
        let problem = "only tools on this node are answered: no Origin, and localhost or a loopback address as Host";
        return refuse(StatusCode::FORBIDDEN, problem);
    }
    next.run(request).await
}

fn is_foreign(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else { return headers.contains_key(ORIGIN) };
    let host = host.to_str().ok().and_then(|h| h.parse::<Authority>().ok());
    let local = host.is_some_and(|authority| {
        let name = authority.host().trim_start_matches('[').trim_end_matches(']');
        name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    });
    !local || headers.contains_key(ORIGIN)
}

async fn dump(State(admin): State<Admin>) -> Response {
    static TURNS: Semaphore = Semaphore::const_new(1);
    answer("application/json", &TURNS, move || config_dump::render(&admin.view)).await
}

async fn filter() -> String {
    format!("current log level is {}\n", logging::filter())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    level: Option<String>,
    reset: Option<String>,
}

async fn set_filter(change: Result<Query<Change>, QueryRejection>) -> Response {
    let wanted = match change {
        Ok(Query(Change { level: None, reset: None })) => return filter().await.into_response(),
        Ok(Query(Change { level: None, reset: Some(_) })) => None,
        Ok(Query(Change { level: Some(level), reset: None })) if level.len() <= MAX_FILTER => Some(notation(&level)),
        _ => {
            let problem = format!("give level=FILTER of at most {MAX_FILTER} bytes, or reset, not both");
            return refuse(StatusCode::BAD_REQUEST, problem);
        }
    };
    match logging::set_filter(wanted.as_deref()) {
        Ok(()) => {
            info!(filter = logging::filter(), "log filter replaced");
            filter().await.into_response()
        }
        Err(e) => refuse(StatusCode::BAD_REQUEST, printable(&e.to_string())),
    }
}

/// `istioctl` writes `module:level` where a filter has `module=level`; a module's own colons come in pairs.
fn notation(level: &str) -> String {
    let directive = |d: &str| match d.rsplit_once(':') {
        Some((module, level)) if !module.ends_with(':') => format!("{module}={level}"),
        _ => d.to_owned(),
    };
    level.split(',').map(directive).collect::<Vec<_>>().join(",")
}

async fn end(State(admin): State<Admin>) -> &'static str {
    info!("asked to end (/quitquitquit)");
    admin.quit.notify_one();
    "shutting down\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_notations_of_a_filter_are_understood() {
        for (given, understood) in [
            ("debug", "debug"),
            ("info,underpass::tunnel=debug", "info,underpass::tunnel=debug"),
            ("underpass::tunnel:debug,access:off", "underpass::tunnel=debug,access=off"),
            ("underpass::tunnel", "underpass::tunnel"),
        ] {
            assert_eq!(notation(given), understood);
        }
    }

    #[test]
    fn web_pages_are_foreign() {
        let foreign = |headers: &[(axum::http::HeaderName, &str)]| {
            is_foreign(&headers.iter().map(|(name, value)| (name.clone(), value.parse().expect("a value"))).collect())
        };
        for host in ["localhost:15000", "127.0.0.1:15000", "[::1]:15000", "localhost"] {
            assert!(!foreign(&[(HOST, host)]), "{host}");
            assert!(foreign(&[(HOST, host), (ORIGIN, "http://localhost:15000")]), "{host}");
        }
        for host in ["attacker.example:15000", "10.0.0.1:15000", "localhost.attacker.example", ""] {
            assert!(foreign(&[(HOST, host)]), "{host}");
        }
        assert!(!foreign(&[]) && foreign(&[(ORIGIN, "null")]));
    }
}
