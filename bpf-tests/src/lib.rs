//! What the tests of the BPF programs share: the object loaded through libbpf, packets, namespaces and cgroups.
//!
//! Everything here needs root. Maps are not pinned, namespaces and cgroups are the process's own, so runs do not meet.

pub mod cgroup;
pub mod foreign;
pub mod namespace;
pub mod object;
pub mod packet;
