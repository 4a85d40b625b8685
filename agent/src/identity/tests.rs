mod files;
mod kept;
mod local;
mod rotation;
mod schedule;
mod store;

use std::{collections::BTreeSet, time::Duration};

use crate::mesh::{SpiffeId, TrustDomain};

/// Nothing awaited in these tests takes nearly as long.
const LIMIT: Duration = Duration::from_secs(30);

fn domain() -> TrustDomain {
    "td.test".parse().unwrap()
}

fn identity(name: &str) -> SpiffeId {
    SpiffeId::new(domain(), "default", name).unwrap()
}

fn set(names: &[&str]) -> BTreeSet<SpiffeId> {
    names.iter().map(|n| identity(n)).collect()
}
