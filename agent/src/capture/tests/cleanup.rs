//! Cleaning up.
