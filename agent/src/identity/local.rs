//! An embedded certificate authority for one machine.

/// The embedded CA.
pub struct LocalIssuer {}
