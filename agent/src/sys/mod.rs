//! System calls that no crate wraps. One small function each, with its invariant; nothing else in the agent's
//! user-space path is `unsafe`.

pub mod bpf;
pub mod bpf_probe;
pub mod descriptors;
pub mod heap;
pub mod net;
pub mod tcp;
pub mod tls;
