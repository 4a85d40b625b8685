//! A signer that somebody else replaces, perhaps together with its root.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::ca::signer::Signer;

/// Makes a replacement of the root one with overlap: the new root is distributed for one lifetime before its key signs,
/// and the old one stays trusted for two more. Only while this process runs: it writes to nobody's Secret.
pub(super) struct Overlap {
    lifetime: Duration,
    current: Option<Arc<Signer>>,
    previous: Option<(Arc<Signer>, SystemTime)>,
}

impl Overlap {
    pub(super) fn new(lifetime: Duration) -> Self {
        Self { lifetime, current: None, previous: None }
    }

    /// What is there now.
    pub(super) fn read(&mut self, signer: Signer, now: SystemTime) {
        if self.current.as_ref().is_some_and(|current| current.same(&signer)) {
            return;
        }
        let old = self.current.replace(Arc::new(signer));
        let new = self.current.as_ref();
        // An intermediate below the same root needs no overlap.
        if let (Some(old), Some(new)) = (old, new)
            && !new.roots().iter().all(|root| old.roots().contains(root))
        {
            self.previous = Some((old, now));
        }
    }

    /// What signs at `now`, with every root to trust, and when that is to be asked again.
    pub(super) fn at(&mut self, now: SystemTime) -> Result<Option<(Signer, Option<SystemTime>)>, String> {
        let Some(current) = &self.current else { return Ok(None) };
        let Some((previous, since)) = &self.previous else { return Ok(Some((current.trusting(&[])?, None))) };
        let (promote, retire) = (*since + self.lifetime, *since + 3 * self.lifetime);
        if now < promote && previous.not_after() > now {
            let signer = previous.trusting(current.roots())?;
            return Ok(Some((signer, Some(promote.min(previous.not_after())))));
        }
        if now < retire {
            return Ok(Some((current.trusting(previous.roots())?, Some(retire))));
        }
        let signer = current.trusting(&[])?;
        self.previous = None;
        Ok(Some((signer, None)))
    }
}
