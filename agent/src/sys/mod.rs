//! System calls that no crate wraps, and what several callers make of one. One small function each, with its invariant; nothing else in
//! the agent's user-space path is `unsafe`.

pub mod bpf;
pub mod bpf_probe;
pub mod contained;
pub mod file;
pub mod heap;
pub mod net;
pub mod rcu;
pub mod tcp;
pub mod tls;
