//! Where the mesh model comes from.

pub mod file;
pub mod kubernetes;
mod last_good;
