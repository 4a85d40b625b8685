//! End to end: two nodes, agents, unmodified programs, and a sniffer on the wire.
//!
//! Needs root. Every test makes its own namespaces, cgroups and pins and removes them; several run side by side.

mod absence;
mod bypass;
mod certificates;
mod coexistence;
mod connections;
mod failures;
mod hardened;
mod ktls;
mod lifecycle;
mod limits;
mod operators;
mod pod_root;
mod policy;
mod probes;
mod refusals;
mod revocation;
mod telemetry;
mod traffic;
mod untouched;
mod upgrade;
mod world;
