//! SPIFFE verification of both sides.
