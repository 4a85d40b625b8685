//! Whether the API server serves a kind, and when a kind that it no longer serves is believed to be
//! gone.
//!
//! One "not found" proves nothing: an API server that starts, an aggregated API that is down and a
//! proxy in between answer 404 too. A kind of which objects are known keeps them until its CRD is
//! gone, which the API server must say for minutes.

use std::time::{Duration, Instant};

use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, ListParams},
};

use super::status::Kind;

/// How long the API server must say, again and again, that it does not serve a kind and that the
/// kind's CRD does not exist before the objects of the kind are given up. Longer than a restart of
/// an API server, or of all of them one after the other.
pub(super) const GONE: Duration = Duration::from_mins(3);
/// How long the API server must say that it does not serve a kind of which nothing was ever known,
/// where the agent may not look at CRDs. API servers before Kubernetes 1.24 answer 404 for a moment
/// while they start; later ones answer 503.
pub(super) const NEVER_THERE: Duration = Duration::from_secs(3);

/// What one look at the API server says about a kind.
#[derive(Debug, Clone)]
pub(super) enum Look {
    /// The API server serves this version.
    Serves(&'static str),
    /// The API server answers that it serves no version that can be read.
    Lacks(Crd),
    /// The API server did not say.
    Failed(String),
}

/// What the API server says about the CRD of a kind.
#[derive(Debug, Clone)]
pub(super) enum Crd {
    /// The kind has none: every API server serves it.
    BuiltIn,
    /// It is there.
    Exists,
    /// A complete list of CRDs does not have it.
    None,
    /// The API server knows no CRDs at all.
    NotServed,
    /// The API server did not say, or may not tell this agent.
    Untold(String),
}

/// What to do about a kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Follow it in this version.
    Read(&'static str),
    /// There is nothing of this kind.
    Nothing,
    /// What is known of it stays in force, for this reason. Look again.
    Keep(String),
}

/// What is known about one kind.
#[derive(Debug)]
pub(super) struct Presence {
    kind: Kind,
    /// It is known to exist, and objects of it may be known: from the last good copy, or because it
    /// was listed.
    known: bool,
    /// The version that was listed.
    version: Option<&'static str>,
    /// Since when another version is served instead.
    other: Option<Instant>,
    /// Since when the kind has not been served, as far as nothing contradicts that it is gone.
    missing: Option<Instant>,
}

impl Presence {
    /// `known`: the last good copy says that the kind exists.
    pub(super) fn new(kind: Kind, known: bool) -> Self {
        Self { kind, known, version: None, other: None, missing: None }
    }

    /// A list of the kind is complete.
    pub(super) fn listed(&mut self, version: &'static str) {
        (self.known, self.version) = (true, Some(version));
    }

    /// Versions in the order in which they are looked for. The one that was listed comes first.
    pub(super) fn order(&self, versions: &[&'static str]) -> Vec<&'static str> {
        let others = versions.iter().copied().filter(|v| Some(*v) != self.version);
        self.version.into_iter().chain(others).collect()
    }

    /// Decides after a look at the API server.
    pub(super) fn judge(&mut self, look: Look, now: Instant) -> Verdict {
        match look {
            Look::Serves(version) => {
                self.missing = None;
                match self.version {
                    Some(listed) if listed != version => self.another(listed, version, now),
                    _ => {
                        self.other = None;
                        Verdict::Read(version)
                    }
                }
            }
            Look::Lacks(crd) => self.absent(crd, now),
            Look::Failed(error) => {
                self.missing = None;
                Verdict::Keep(error)
            }
        }
    }

    /// A list in another version may lack what the listed one had, so the old version gets time to
    /// come back.
    fn another(&mut self, listed: &str, version: &'static str, now: Instant) -> Verdict {
        if elapsed(&mut self.other, now) >= GONE {
            (self.version, self.other) = (None, None);
            return Verdict::Read(version);
        }
        Verdict::Keep(format!(
            "the API server no longer serves version {listed}, which was read until now; {version} is read if that lasts {} minutes",
            GONE.as_secs() / 60
        ))
    }

    fn absent(&mut self, crd: Crd, now: Instant) -> Verdict {
        let (group, _, plural) = self.kind.names();
        let name = format!("{plural}.{group}");
        self.other = None;
        match (crd, self.known) {
            (Crd::None | Crd::NotServed, false) => Verdict::Nothing,
            (Crd::Untold(_), false) if elapsed(&mut self.missing, now) >= NEVER_THERE => Verdict::Nothing,
            (Crd::Untold(why), false) => {
                Verdict::Keep(format!("the API server does not serve {name}; whether its CRD exists: {why}"))
            }
            (Crd::None, true) => {
                if elapsed(&mut self.missing, now) >= GONE {
                    (self.known, self.version, self.missing) = (false, None, None);
                    return Verdict::Nothing;
                }
                Verdict::Keep(format!(
                    "the API server does not serve {name} any more, and has no such CRD; its objects are given up if that lasts {} minutes",
                    GONE.as_secs() / 60
                ))
            }
            (crd, _) => {
                self.missing = None;
                let why = match crd {
                    Crd::Exists => "although its CRD exists".to_owned(),
                    Crd::BuiltIn => "which every API server has".to_owned(),
                    Crd::Untold(why) => format!("and whether its CRD exists is not known: {why}"),
                    Crd::NotServed | Crd::None => "and knows no CRDs".to_owned(),
                };
                let advice = "is it starting, or its aggregated API down?";
                Verdict::Keep(format!("the API server answers that it does not serve {name}, {why}; {advice}"))
            }
        }
    }
}

/// Time since the event, which begins now unless it has begun.
fn elapsed(since: &mut Option<Instant>, now: Instant) -> Duration {
    now.saturating_duration_since(*since.get_or_insert(now))
}

/// Asks the API server which of the versions it serves.
pub(super) async fn look(client: &Client, kind: Kind, versions: &[&'static str]) -> Look {
    let (group, _, plural) = kind.names();
    if group.is_empty() {
        // The core group is always there.
        return versions.first().map_or_else(|| Look::Failed("no version".to_owned()), |v| Look::Serves(v));
    }
    for version in versions {
        match client.list_api_group_resources(&format!("{group}/{version}")).await {
            Ok(list) if list.resources.iter().any(|r| r.name == plural) => return Look::Serves(version),
            Ok(_) => {}
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 410) => {}
            Err(error) => return Look::Failed(error.to_string()),
        }
    }
    Look::Lacks(if kind.is_custom() { crd(client, &format!("{plural}.{group}")).await } else { Crd::BuiltIn })
}

/// Asks for a CRD by a list: an empty list says that there is none, while "not found" may have any
/// cause.
async fn crd(client: &Client, name: &str) -> Crd {
    let resource = ApiResource {
        group: "apiextensions.k8s.io".to_owned(),
        version: "v1".to_owned(),
        api_version: "apiextensions.k8s.io/v1".to_owned(),
        kind: "CustomResourceDefinition".to_owned(),
        plural: "customresourcedefinitions".to_owned(),
    };
    let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
    let only = ListParams::default().fields(&format!("metadata.name={name}"));
    match api.list_metadata(&only).await {
        Ok(list) if list.items.iter().any(|crd| crd.metadata.name.as_deref() == Some(name)) => Crd::Exists,
        Ok(list) if list.metadata.continue_.as_deref().is_none_or(str::is_empty) => Crd::None,
        Ok(_) => Crd::Untold("the list of CRDs is not complete".to_owned()),
        Err(kube::Error::Api(status)) if status.code == 404 => Crd::NotServed,
        Err(error) => Crd::Untold(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Crd, GONE, Look, NEVER_THERE, Presence, Verdict};
    use crate::sources::kubernetes::status::Kind;

    const SECOND: Duration = Duration::from_secs(1);

    fn untold() -> Look {
        Look::Lacks(Crd::Untold("403".to_owned()))
    }

    fn keeps(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Keep(_))
    }

    #[test]
    fn a_kind_that_was_never_there_is_nothing() {
        let now = Instant::now();
        for crd in [Crd::None, Crd::NotServed] {
            let mut presence = Presence::new(Kind::PeerAuthentication, false);
            assert_eq!(presence.judge(Look::Lacks(crd), now), Verdict::Nothing);
        }
        let mut presence = Presence::new(Kind::PeerAuthentication, false);
        assert!(keeps(&presence.judge(untold(), now)), "one answer proves nothing where CRDs cannot be seen");
        assert_eq!(presence.judge(untold(), now + NEVER_THERE), Verdict::Nothing);
        let mut presence = Presence::new(Kind::PeerAuthentication, false);
        for minute in 0..10 {
            let look = Look::Lacks(Crd::Exists);
            assert!(keeps(&presence.judge(look, now + SECOND * 60 * minute)), "its CRD is there: discovery is wrong");
        }
    }

    #[test]
    fn a_known_kind_is_given_up_only_after_its_crd_was_gone_for_minutes() {
        let start = Instant::now();
        let gone = || Look::Lacks(Crd::None);
        for from_copy in [true, false] {
            let mut presence = Presence::new(Kind::AuthorizationPolicy, from_copy);
            if !from_copy {
                presence.listed("v1");
            }
            assert!(keeps(&presence.judge(gone(), start)));
            assert!(keeps(&presence.judge(gone(), start + GONE.saturating_sub(SECOND))));
            assert_eq!(presence.judge(gone(), start + GONE), Verdict::Nothing);
            assert_eq!(presence.judge(gone(), start + GONE + SECOND), Verdict::Nothing, "and stays so");
        }
    }

    #[test]
    fn whatever_contradicts_it_begins_the_minutes_anew() {
        let start = Instant::now();
        let gone = || Look::Lacks(Crd::None);
        let contradictions = [
            untold(),
            Look::Lacks(Crd::NotServed),
            Look::Lacks(Crd::Exists),
            Look::Failed("503".to_owned()),
            Look::Serves("v1"),
        ];
        for other in contradictions {
            let mut presence = Presence::new(Kind::AuthorizationPolicy, true);
            assert!(keeps(&presence.judge(gone(), start)));
            presence.judge(other.clone(), start + GONE / 2);
            assert!(keeps(&presence.judge(gone(), start + GONE)), "{other:?}");
            assert!(keeps(&presence.judge(gone(), start + GONE + GONE / 2)), "{other:?}");
            assert_eq!(presence.judge(gone(), start + 2 * GONE), Verdict::Nothing, "{other:?}");
        }
        // Without the CRD's own word it is never given up.
        for look in [untold(), Look::Lacks(Crd::NotServed), Look::Failed("500".to_owned())] {
            let mut presence = Presence::new(Kind::AuthorizationPolicy, true);
            for hour in 0..48 {
                assert!(keeps(&presence.judge(look.clone(), start + SECOND * 3600 * hour)), "{look:?}");
            }
        }
    }

    #[test]
    fn built_in_kinds_are_never_given_up() {
        let start = Instant::now();
        for known in [false, true] {
            let mut presence = Presence::new(Kind::EndpointSlice, known);
            for hour in 0..48 {
                let look = Look::Lacks(Crd::BuiltIn);
                assert!(keeps(&presence.judge(look, start + SECOND * 3600 * hour)));
            }
        }
    }

    #[test]
    fn the_version_that_was_listed_is_not_left_at_once() {
        let start = Instant::now();
        let mut presence = Presence::new(Kind::PeerAuthentication, false);
        assert_eq!(presence.judge(Look::Serves("v1"), start), Verdict::Read("v1"));
        assert_eq!(presence.judge(Look::Serves("v1beta1"), start), Verdict::Read("v1beta1"), "nothing was listed yet");
        presence.listed("v1beta1");
        assert_eq!(presence.order(&["v1", "v1beta1"]), ["v1beta1", "v1"]);
        assert!(keeps(&presence.judge(Look::Serves("v1"), start + SECOND)));
        assert_eq!(presence.judge(Look::Serves("v1beta1"), start + GONE), Verdict::Read("v1beta1"));
        assert!(keeps(&presence.judge(Look::Serves("v1"), start + GONE + SECOND)), "the time begins anew");
        assert_eq!(presence.judge(Look::Serves("v1"), start + 2 * GONE + SECOND), Verdict::Read("v1"));
    }
}
