//! Roots and keys, and how they change.

use std::time::{Duration, SystemTime};

use rcgen::{KeyPair, PublicKeyData};
use zeroize::Zeroizing;

use super::{Broken, Part, Root, Rules, pem_of};

/// One authority. No `Debug`: it holds keys.
pub(crate) struct Authority {
    /// Oldest first.
    roots: Vec<Root>,
    key: KeyPair,
    /// Of the newest root, while it is only distributed.
    next: Option<KeyPair>,
    /// Index of the root whose key signs.
    signing: usize,
}

/// What changed, and therefore has to be persisted before it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// `next.key` had no root: it was dropped.
    Undone,
    /// A new root and `next.key`: it is distributed from now on.
    Distributing,
    /// `next.key` became the key that signs.
    Promoted,
    /// This many superseded roots were dropped.
    Retired(usize),
}

/// An authority as it is persisted.
pub(crate) struct Pem {
    pub(crate) roots: String,
    pub(crate) key: Zeroizing<String>,
    pub(crate) next: Option<Zeroizing<String>>,
}

impl Authority {
    /// A new one, with one root that signs at once.
    pub(crate) fn create(rules: &Rules, now: SystemTime) -> Result<Self, Broken> {
        let (root, key) = Root::create(rules, now)?;
        Ok(Self { roots: vec![root], key, next: None, signing: 0 })
    }

    /// Reads what was persisted.
    pub(crate) fn parse(roots: &[u8], key: &[u8], next: Option<&[u8]>) -> Result<Self, Broken> {
        let roots = Root::parse_all(roots)?;
        let key = parse_key(Part::Key, key)?;
        let next = next.map(|next| parse_key(Part::NextKey, next)).transpose()?;
        let signing = position(&roots, &key).ok_or_else(|| {
            let remedy =
                "it is the key of none of the roots in ca.crt; restore both from one backup, or remove both to start a new CA";
            Broken::new(Part::Key, remedy)
        })?;
        Ok(Self { roots, key, next, signing })
    }

    /// Does what is due, one step per call; `None` when there is nothing to do until [`due`](Self::due). An error when
    /// the signing root has expired.
    pub(crate) fn step(&mut self, rules: &Rules, now: SystemTime) -> Result<Option<Step>, Broken> {
        if let Some(next) = self.next.take() {
            match position(&self.roots, &next) {
                None => return Ok(Some(Step::Undone)),
                Some(i) if now < self.roots[i].created + rules.lifetime => self.next = Some(next),
                Some(i) => {
                    (self.key, self.signing) = (next, i);
                    return Ok(Some(Step::Promoted));
                }
            }
        }
        if self.signing().not_after <= now {
            let remedy = "the signing root has expired; remove ca.crt and ca.key to start a new CA";
            return Err(Broken::new(Part::Roots, remedy));
        }
        if self.signing > 0 && now >= self.retire_at(rules) {
            let superseded = std::mem::take(&mut self.signing);
            self.roots.drain(..superseded);
            return Ok(Some(Step::Retired(superseded)));
        }
        if self.roots[self.signing].not_after < now + rules.replaced_before {
            return self.rotate(rules, now);
        }
        Ok(None)
    }

    /// Starts replacing the root: a new one is distributed at once, signs after one lifetime, and the old one is
    /// dropped two lifetimes after that. `None` while such a replacement is under way.
    pub(crate) fn rotate(&mut self, rules: &Rules, now: SystemTime) -> Result<Option<Step>, Broken> {
        if self.next.is_some() || self.signing + 1 != self.roots.len() {
            return Ok(None);
        }
        let (root, key) = Root::create(rules, now)?;
        self.roots.push(root);
        self.next = Some(key);
        Ok(Some(Step::Distributing))
    }

    /// When [`step`](Self::step) has something to do next.
    pub(crate) fn due(&self, rules: &Rules) -> SystemTime {
        let replace = self.roots[self.signing].not_after.checked_sub(rules.replaced_before);
        let promote = self.next.as_ref().and_then(|next| position(&self.roots, next));
        let promote = promote.map(|i| self.roots[i].created + rules.lifetime);
        let retire = (self.signing > 0).then(|| self.retire_at(rules));
        // With a replacement under way, the old root's end is no reason for another.
        let replace = replace.filter(|_| self.next.is_none());
        [replace, promote, retire].into_iter().flatten().min().unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Every root that is trusted, oldest first.
    pub(crate) fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// The root whose key signs.
    pub(crate) fn signing(&self) -> &Root {
        &self.roots[self.signing]
    }

    /// The key that signs.
    pub(crate) fn key(&self) -> &KeyPair {
        &self.key
    }

    /// What has to be persisted.
    pub(crate) fn pem(&self) -> Pem {
        let pem = |key: &KeyPair| Zeroizing::new(key.serialize_pem());
        Pem { roots: pem_of(&self.roots), key: pem(&self.key), next: self.next.as_ref().map(pem) }
    }

    /// Once nothing the older roots signed can be valid any more.
    fn retire_at(&self, rules: &Rules) -> SystemTime {
        let overlap: Duration = rules.lifetime;
        self.roots[self.signing].created + overlap + 2 * rules.lifetime
    }
}

fn position(roots: &[Root], key: &KeyPair) -> Option<usize> {
    roots.iter().position(|r| r.public_key == key.subject_public_key_info())
}

fn parse_key(part: Part, text: &[u8]) -> Result<KeyPair, Broken> {
    std::str::from_utf8(text)
        .map_err(|e| e.to_string())
        .and_then(|t| KeyPair::from_pem(t).map_err(|e| e.to_string()))
        .map_err(|e| Broken::new(part, format!("{e}; restore it from a backup")))
}
