//! Enrolling.
