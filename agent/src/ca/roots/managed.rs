//! A root that the replicas make, share and rotate: in a Secret, changed only by whoever read its latest version.

use std::{collections::BTreeMap, time::SystemTime};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use tracing::{info, warn};

use super::{
    MAX_SLEEP, Publish, pause,
    secret::{SecretError, Secrets, next},
};
use crate::{
    ca::signer::Signer,
    identity::authority::{Authority, Part, Pem, Rules, Step},
};

/// Annotation that asks for a new root now; removed when that has begun.
pub(super) const ROTATE: &str = "underpass.io/rotate-root";
/// Conflicts in a row before it is called a failure and waited for.
const MAX_CONFLICTS: u32 = 10;

pub(super) async fn run(secrets: &Secrets, rules: Rules, to: &Publish) {
    let mut changes = secrets.changes();
    let mut managed = Managed { secrets, rules, last: None };
    let mut failures = 0;
    loop {
        let limit = match managed.settle().await {
            Ok((signer, due)) => {
                failures = 0;
                to.put(signer);
                due.duration_since(SystemTime::now()).unwrap_or_default().min(MAX_SLEEP)
            }
            Err(error) => {
                let pause = pause(failures);
                failures += 1;
                let signing = managed.last.is_some();
                warn!(%error, ?pause, signing, "the root's Secret could not be brought up to date");
                pause
            }
        };
        next(&mut changes, limit).await;
    }
}

struct Managed<'a> {
    secrets: &'a Secrets,
    rules: Rules,
    /// What was in force last: put back when the Secret is deleted under a running mesh.
    last: Option<Pem>,
}

impl Managed<'_> {
    /// Reads the Secret, does what is due and writes it. What is returned is persisted.
    async fn settle(&mut self) -> Result<(Signer, SystemTime), SecretError> {
        let mut conflicts = 0;
        let authority = loop {
            match self.attempt().await {
                Err(SecretError::Conflict(_)) if conflicts < MAX_CONFLICTS => conflicts += 1,
                result => break result?,
            }
        };
        let signer = Signer::of_authority(&authority).map_err(|e| self.secrets.content(e))?;
        let due = authority.due(&self.rules);
        self.last = Some(authority.pem());
        Ok((signer, due))
    }

    async fn attempt(&mut self) -> Result<Authority, SecretError> {
        let now = SystemTime::now();
        let Some(mut secret) = self.secrets.get().await? else {
            let (authority, steps) = self.fresh(now)?;
            self.secrets.create(data(&authority.pem())).await?;
            log(&steps);
            return Ok(authority);
        };
        let (mut authority, mut steps) = match self.read(&secret)? {
            Some(authority) => (authority, Vec::new()),
            None => self.fresh(now)?,
        };
        let wanted = secret.metadata.annotations.as_mut().and_then(|a| a.remove(ROTATE)).is_some();
        if wanted {
            steps.extend(authority.rotate(&self.rules, now).map_err(|e| self.broken(&e))?.map(Change::Step));
        }
        while let Some(step) = authority.step(&self.rules, now).map_err(|e| self.broken(&e))? {
            steps.push(Change::Step(step));
        }
        if wanted || !steps.is_empty() {
            let kept = secret.data.get_or_insert_default();
            for part in [Part::Roots, Part::Key, Part::NextKey] {
                kept.remove(part.name());
            }
            kept.extend(data(&authority.pem()));
            self.secrets.replace(&secret).await?;
            log(&steps);
        }
        Ok(authority)
    }

    /// `None` for a Secret without any of the parts.
    fn read(&self, secret: &Secret) -> Result<Option<Authority>, SecretError> {
        let part = |part: Part| secret.data.as_ref().and_then(|d| d.get(part.name())).map(|v| v.0.as_slice());
        match (part(Part::Roots), part(Part::Key)) {
            (None, None) => Ok(None),
            (Some(roots), Some(key)) => {
                Authority::parse(roots, key, part(Part::NextKey)).map(Some).map_err(|e| self.broken(&e))
            }
            (None, Some(_)) => Err(self
                .secrets
                .content("ca.crt is missing but ca.key is there; restore it, or remove ca.key to start a new CA")),
            (Some(_), None) => Err(self
                .secrets
                .content("ca.key is missing but ca.crt is there; restore it, or remove ca.crt to start a new CA")),
        }
    }

    /// What was in force, or a new authority when nothing was.
    fn fresh(&self, now: SystemTime) -> Result<(Authority, Vec<Change>), SecretError> {
        match &self.last {
            Some(pem) => {
                let next = pem.next.as_ref().map(|next| next.as_bytes());
                let authority = Authority::parse(pem.roots.as_bytes(), pem.key.as_bytes(), next);
                Ok((authority.map_err(|e| self.broken(&e))?, vec![Change::PutBack]))
            }
            None => Ok((Authority::create(&self.rules, now).map_err(|e| self.broken(&e))?, vec![Change::Created])),
        }
    }

    fn broken(&self, broken: &crate::identity::authority::Broken) -> SecretError {
        self.secrets.content(broken.to_string())
    }
}

enum Change {
    Created,
    PutBack,
    Step(Step),
}

/// Once it is persisted.
fn log(changes: &[Change]) {
    for change in changes {
        match change {
            Change::Created => info!("created a root"),
            Change::PutBack => warn!("the root's Secret was gone; put back what was in force"),
            Change::Step(Step::Undone) => warn!("removed next.key: its root was never distributed"),
            Change::Step(Step::Distributing) => info!("distributing a new root"),
            Change::Step(Step::Promoted) => info!("the new root signs from now on"),
            Change::Step(Step::Retired(removed)) => info!(removed, "removed superseded roots"),
        }
    }
}

fn data(pem: &Pem) -> BTreeMap<String, ByteString> {
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    let mut data = BTreeMap::from([
        (Part::Roots.name().to_owned(), bytes(&pem.roots)),
        (Part::Key.name().to_owned(), bytes(&pem.key)),
    ]);
    data.extend(pem.next.as_ref().map(|next| (Part::NextKey.name().to_owned(), bytes(next))));
    data
}
