//! The agent's own interface on a unix socket (0600): HTTP/1.1 with JSON bodies.
//!
//! | Request | Answer |
//! |---|---|
//! | `GET /v1/status` | [`api::Status`] |
//! | `GET /v1/connections?limit=N&..` | [`api::Connections`], `N` from 1 to 100000, 1000 by default; parameters [`query::ConnectionQuery`] |
//! | `POST /v1/connections/{id}/close` | [`api::Closed`], or 404 when there is no such connection |
//! | `GET /v1/counters` | [`api::AllCounters`] |
//! | `GET /v1/workloads?limit=N` | [`inventory::Workloads`], `N` as above |
//! | `GET /v1/services?limit=N` | [`inventory::Services`], `N` as above |
//! | `GET /v1/certificates` | [`inventory::Certificates`] |
//! | `GET /v1/policies` | [`crate::policy::PolicyList`] |
//! | `GET /v1/policies/explain?to=..&from=..` | [`crate::policy::Explanations`], parameters [`api::ExplainParameters`] |
//!
//! Whatever is refused is answered with [`api::Problem`].

pub mod api;
pub mod client;
pub mod http;
pub mod inventory;
pub mod query;
pub mod server;
#[cfg(test)]
mod tests;
