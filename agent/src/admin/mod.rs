//! The agent's own interface on a unix socket (0600): HTTP/1.1 with JSON bodies.

pub mod api;
pub mod client;
pub mod server;
