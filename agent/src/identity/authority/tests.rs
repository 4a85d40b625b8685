use std::time::{Duration, SystemTime};

use super::{Authority, Part, Rules, Step};

const HOUR: Duration = Duration::from_hours(1);

fn rules() -> Rules {
    Rules {
        organisation: "Test",
        common_name: "td.test".into(),
        lifetime: HOUR,
        root_validity: 100 * HOUR,
        replaced_before: 10 * HOUR,
    }
}

/// Every step that is due, at times that `due` says, up to `end`.
fn steps(authority: &mut Authority, start: SystemTime, end: SystemTime) -> Vec<(u64, Step)> {
    let (rules, mut seen, mut now) = (rules(), Vec::new(), start);
    while now < end {
        while let Some(step) = authority.step(&rules, now).unwrap() {
            // To the nearest hour: dates in certificates have whole seconds.
            seen.push(((now.duration_since(start).unwrap().as_secs() + 1800) / 3600, step));
            // What is persisted says the same.
            let pem = authority.pem();
            let next = pem.next.as_ref().map(|next| next.as_bytes());
            *authority = Authority::parse(pem.roots.as_bytes(), pem.key.as_bytes(), next).unwrap();
        }
        let due = authority.due(&rules);
        assert!(due > now, "nothing is left to do at {now:?}, but {due:?} is said to be due");
        now = due + Duration::from_secs(1);
    }
    seen
}

#[test]
fn an_old_root_is_replaced_with_overlap() {
    let start = SystemTime::now();
    let mut authority = Authority::create(&rules(), start).unwrap();
    let old = authority.signing().public_key.clone();
    let seen = steps(&mut authority, start, start + 99 * HOUR);
    assert_eq!(seen, [(90, Step::Distributing), (91, Step::Promoted), (93, Step::Retired(1))]);
    assert_eq!(authority.roots().len(), 1);
    assert_ne!(authority.signing().public_key, old);
}

#[test]
fn a_rotation_that_is_asked_for_happens_once() {
    let now = SystemTime::now();
    let mut authority = Authority::create(&rules(), now).unwrap();
    assert_eq!(authority.rotate(&rules(), now).unwrap(), Some(Step::Distributing));
    assert_eq!(authority.rotate(&rules(), now).unwrap(), None);
    assert_eq!(authority.step(&rules(), now).unwrap(), None, "distributed first");
    assert_eq!((authority.roots().len(), authority.signing().created), (2, authority.roots()[0].created));
    assert_eq!(steps(&mut authority, now, now + 5 * HOUR), [(1, Step::Promoted), (3, Step::Retired(1))]);
}

#[test]
fn a_key_whose_root_was_never_written_is_dropped() {
    let now = SystemTime::now();
    let mut authority = Authority::create(&rules(), now).unwrap();
    let before = authority.pem();
    authority.rotate(&rules(), now).unwrap();
    let next = authority.pem().next.unwrap();
    let mut crashed = Authority::parse(before.roots.as_bytes(), before.key.as_bytes(), Some(next.as_bytes())).unwrap();
    assert_eq!(crashed.step(&rules(), now).unwrap(), Some(Step::Undone));
    assert!(crashed.pem().next.is_none());
}

#[test]
fn an_expired_root_signs_nothing() {
    let now = SystemTime::now();
    let mut authority = Authority::create(&rules(), now).unwrap();
    let broken = authority.step(&rules(), now + 101 * HOUR).unwrap_err();
    assert_eq!(broken.part, Part::Roots);
    assert!(broken.reason.contains("expired") && broken.reason.contains("remove"), "{broken}");
}

#[test]
fn parts_of_different_authorities_do_not_fit() {
    let now = SystemTime::now();
    let (one, other) =
        (Authority::create(&rules(), now).unwrap().pem(), Authority::create(&rules(), now).unwrap().pem());
    let broken = Authority::parse(one.roots.as_bytes(), other.key.as_bytes(), None).err().unwrap();
    assert_eq!(broken.part, Part::Key);
    assert!(broken.reason.contains("none of the roots"), "{broken}");
    let broken = Authority::parse(one.roots.as_bytes(), one.key.as_bytes(), Some(b"x")).err().unwrap();
    assert_eq!(broken.part, Part::NextKey);
}
