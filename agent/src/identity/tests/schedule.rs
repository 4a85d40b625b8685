use std::time::{Duration, SystemTime};

use crate::{
    identity::{
        Svid,
        schedule::{Slot, renewal, retry},
    },
    tunnel::testing::{TestCa, identity},
};

/// Valid from `from` to `to` seconds after `now`.
fn svid(now: SystemTime, from: u64, to: u64) -> Svid {
    let svid = TestCa::new("root").svid(&identity("web"));
    let start = now - Duration::from_secs(10_000);
    Svid {
        not_before: start + Duration::from_secs(from),
        not_after: start + Duration::from_secs(to),
        ..Svid::clone(&svid)
    }
}

#[test]
fn renewal_is_at_half_life_or_soon_when_that_is_past() {
    let now = SystemTime::now();
    let in_seconds = |svid: &Svid, jitter| renewal(svid, now, jitter).duration_since(now).unwrap().as_secs();
    let fresh = svid(now, 10_000, 13_600);
    assert_eq!(in_seconds(&fresh, 1.0), 1800);
    assert_eq!(in_seconds(&fresh, 0.9), 1620);
    assert_eq!(in_seconds(&fresh, 1.1), 1980);
    // 90 of 100 minutes are over.
    let old = svid(now, 4600, 10_600);
    assert_eq!(in_seconds(&old, 1.0), 60);
    let long = svid(now, 0, 18_000);
    assert_eq!(in_seconds(&long, 1.0), 600);
    let expired = svid(now, 0, 9000);
    assert_eq!(in_seconds(&expired, 1.0), 1);
    let short = svid(now, 9998, 10_002);
    assert_eq!(renewal(&short, now, 1.0).duration_since(now).unwrap(), Duration::from_millis(200));
}

#[test]
fn retries_back_off() {
    let pauses = |validity| (0..9).map(|n| retry(n, validity).as_millis()).collect::<Vec<_>>();
    assert_eq!(pauses(None), [1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000, 60_000]);
    let day = Some(Duration::from_hours(24));
    assert_eq!(pauses(day), pauses(None));
    let short = Some(Duration::from_secs(4));
    assert_eq!(pauses(short)[..4], [200, 400, 400, 400]);
    assert_eq!(retry(u32::MAX, None), Duration::from_mins(1));
}

#[test]
fn a_change_during_an_attempt_is_not_missed() {
    let now = SystemTime::now();
    let mut slot = Slot::default();
    assert_eq!(slot.wait(now), Some(Duration::ZERO), "a new one is due at once");
    slot.start();
    assert_eq!(slot.wait(now), None);
    slot.at_once();
    assert_eq!(slot.wait(now), None, "not twice at the same time");
    slot.issued(&svid(now, 10_000, 13_600), now);
    assert_eq!(slot.wait(now), Some(Duration::ZERO));
    slot.start();
    slot.issued(&svid(now, 10_000, 13_600), now);
    let wait = slot.wait(now).unwrap().as_secs();
    assert!((1619..=1981).contains(&wait), "{wait}");
    slot.start();
    assert_eq!(slot.failed(None, now), Duration::from_secs(1));
    slot.start();
    assert_eq!(slot.failed(None, now), Duration::from_secs(2));
}
