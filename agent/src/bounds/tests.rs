//! What the pools promise, by themselves.

use std::{
    future::pending,
    net::IpAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use tokio::{sync::oneshot, task::JoinSet, time::timeout};

use super::{
    Bound, Entry, Evicted, Lanes, Pool, Room, Rule,
    book::{Book, Taken},
    evictions,
    pool::Alarm,
    source,
};

/// Nothing awaited here takes nearly as long.
const LIMIT: Duration = Duration::from_secs(10);

fn rule(total: usize, share: usize, grace: Duration) -> Rule {
    Rule { total, share, strict: false, grace, bound: Bound::Tunnel }
}

/// A member that never says anything; resolves when it is evicted.
async fn mute(mut entry: Entry<u8>) -> Result<(), Evicted> {
    entry.guard(pin!(pending::<()>())).await
}

/// Puts members that say nothing into the pool, and waits until all are silent.
async fn fill(pool: &Arc<Pool<u8>>, source: u8, count: usize) -> JoinSet<Result<(), Evicted>> {
    let mut members = JoinSet::new();
    for _ in 0..count {
        members.spawn(mute(pool.enter(&source).await));
        tokio::task::yield_now().await;
    }
    members
}

#[tokio::test]
async fn a_stranger_with_many_silent_connections_loses_his_own_first() {
    // Nobody's grace ends in this test; that of the one above his share is a tenth.
    let grace = Duration::from_secs(30);
    let pool = Pool::new(rule(10, 4, grace));
    let mut few = fill(&pool, 1, 3).await;
    let mut many = fill(&pool, 2, 7).await;
    let before = evictions(Bound::Tunnel);
    assert!(pool.try_enter(&3).is_err(), "not even he loses what he has just begun");
    for _ in 0..3 {
        let entry = timeout(LIMIT, pool.enter(&3)).await.expect("a place soon");
        assert_eq!(many.join_next().await.unwrap().unwrap(), Err(Evicted));
        drop(entry);
        many.spawn(mute(pool.try_enter(&2).unwrap()));
        tokio::task::yield_now().await;
    }
    assert!(evictions(Bound::Tunnel) >= before + 3);
    assert_eq!((pool.of(&1), pool.of(&2)), (3, 7));
    assert!(few.try_join_next().is_none(), "nobody within his share lost a place");
}

/// Bytes that come one by one are no progress.
#[tokio::test]
async fn who_drips_yields_as_the_silent_do() {
    let grace = Duration::from_millis(300);
    let pool = Pool::new(rule(2, 2, grace));
    let mut members = JoinSet::new();
    for _ in 0..2 {
        let mut entry = pool.try_enter(&1).unwrap();
        members.spawn(async move {
            let mut ticks = tokio::time::interval(grace / 10);
            let drip = pin!(async {
                loop {
                    ticks.tick().await;
                }
            });
            entry.guard(drip).await
        });
    }
    timeout(2 * grace, pool.enter(&2)).await.expect("the grace is for getting on");
    assert_eq!(members.join_next().await.unwrap().unwrap(), Err::<(), _>(Evicted));
}

#[tokio::test]
async fn a_strict_share_leaves_room_while_everybody_is_served() {
    let pool = Pool::new(Rule { strict: true, ..rule(8, 2, Duration::ZERO) });
    let served = [pool.try_enter(&1).unwrap(), pool.try_enter(&1).unwrap()];
    assert!(pool.try_enter(&1).is_err(), "his share is used up, though there is room");
    let other = pool.try_enter(&2).expect("room for others");
    drop(served);
    let silent = fill(&pool, 1, 2).await;
    let newest = pool.try_enter(&1).expect("for one of his own that is silent");
    assert_eq!(pool.of(&1), 2);
    drop((other, silent, newest));
}

#[tokio::test]
async fn who_gets_on_has_the_grace_anew() {
    let grace = Duration::from_millis(400);
    let pool = Pool::new(rule(1, 1, grace));
    let entry = pool.try_enter(&1).unwrap();
    let voucher = entry.voucher();
    let member = tokio::spawn(mute(entry));
    tokio::time::sleep(grace / 2).await;
    voucher.progress();
    let began = Instant::now();
    let newcomer = timeout(LIMIT, pool.enter(&2)).await.unwrap();
    assert!(began.elapsed() >= grace, "{:?}", began.elapsed());
    assert_eq!(member.await.unwrap(), Err(Evicted));
    drop(newcomer);
}

#[tokio::test]
async fn within_their_shares_the_longest_silent_one_yields_after_the_grace() {
    let grace = Duration::from_millis(400);
    let pool = Pool::new(rule(4, 4, grace));
    let began = Instant::now();
    let mut members = fill(&pool, 1, 4).await;
    let entry = timeout(LIMIT, pool.enter(&2)).await.expect("the grace passes");
    assert!(began.elapsed() >= grace, "nobody had been silent for long enough: {:?}", began.elapsed());
    assert_eq!(members.join_next().await.unwrap().unwrap(), Err(Evicted));
    drop(entry);
}

#[tokio::test]
async fn who_is_served_or_known_keeps_the_place() {
    let pool = Pool::new(rule(2, 0, Duration::ZERO));
    let known = pool.try_enter(&1).unwrap();
    known.voucher().authenticated();
    let served = pool.try_enter(&1).unwrap();
    assert!(pool.try_enter(&2).is_err(), "both stay");
    drop(served);
    let silent = tokio::spawn(mute(pool.try_enter(&2).unwrap()));
    tokio::task::yield_now().await;
    assert!(pool.try_enter(&3).is_ok(), "the third yields");
    assert_eq!(silent.await.unwrap(), Err(Evicted));
    assert!(!known.is_evicted());
}

/// What has come for a task that has not run yet counts: on a busy node nobody is punished for the
/// agent's being late.
#[tokio::test]
async fn who_has_spoken_is_not_silent_though_nobody_has_listened_yet() {
    let pool = Pool::new(rule(2, 0, Duration::ZERO));
    let (say, heard) = oneshot::channel();
    let mut entry = pool.try_enter(&1).unwrap();
    let speaker = tokio::spawn(async move { entry.guard(pin!(heard)).await.map(Result::unwrap) });
    let silent = tokio::spawn(mute(pool.try_enter(&1).unwrap()));
    tokio::task::yield_now().await;
    say.send(7).unwrap();
    // This test's runtime has one thread, so the task has not run since.
    let newcomer = pool.try_enter(&2).unwrap();
    assert_eq!(speaker.await.unwrap(), Ok(7));
    assert_eq!(silent.await.unwrap(), Err(Evicted));
    drop(newcomer);
}

#[tokio::test]
async fn waiting_ends_when_a_place_is_free() {
    let pool = Pool::new(rule(1, 1, LIMIT));
    let first = pool.try_enter(&1).unwrap();
    let mut waiting = JoinSet::new();
    for source in 2..5 {
        let pool = Arc::clone(&pool);
        waiting.spawn(async move { drop(pool.enter(&source).await) });
    }
    tokio::task::yield_now().await;
    drop(first);
    timeout(LIMIT, waiting.join_all()).await.expect("one after the other");
    assert!(pool.is_empty());
}

#[test]
fn an_ipv6_source_is_its_network() {
    let s = |text: &str| source(text.parse::<IpAddr>().unwrap()).to_string();
    assert_eq!(s("10.1.2.3"), "10.1.2.3");
    assert_eq!(s("::ffff:10.1.2.3"), "10.1.2.3");
    assert_eq!(s("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
}

#[test]
fn a_room_leaves_places_for_others() {
    let room = Room::new(1000, 4, Bound::Connections);
    let mut first: Vec<_> = std::iter::from_fn(|| room.try_enter("a")).collect();
    assert_eq!(first.len(), 800, "four times what is left");
    let second: Vec<_> = std::iter::from_fn(|| room.try_enter("b")).collect();
    assert!(second.len() >= 150, "{}", second.len());
    assert!(room.try_enter("c").is_some(), "and there is room for a third one");
    first.truncate(100);
    assert!(room.try_enter("b").is_some());
    drop((first, second));
    assert_eq!(room.taken(), 0);
}

#[test]
fn a_small_room_can_be_one_holders() {
    let room = Room::new(50, 256, Bound::Connections);
    let all: Vec<_> = std::iter::from_fn(|| room.try_enter(1)).collect();
    assert_eq!(all.len(), 50);
}

#[tokio::test]
async fn a_dead_destination_holds_up_nobody_else() {
    let lanes = Lanes::new(2);
    let limit = Duration::from_millis(200);
    let dead = lanes.to("dead");
    let turns = (dead.turn(limit).await.unwrap(), dead.turn(limit).await.unwrap());
    let waiting = lanes.to("dead");
    assert!(lanes.to("alive").turn(Duration::ZERO).await.is_some(), "at once");
    let began = Instant::now();
    assert!(waiting.turn(limit).await.is_none(), "given up: nobody got through");
    assert!(began.elapsed() >= limit);
    drop(turns);
    assert!(waiting.turn(limit).await.is_some());
    assert_eq!(lanes.destinations(), 1);
    drop((dead, waiting));
    assert_eq!(lanes.destinations(), 0, "no destination is remembered");
}

#[tokio::test]
async fn who_waits_for_a_busy_destination_waits_on_while_it_answers() {
    let lanes = Lanes::new(1);
    let limit = Duration::from_secs(2);
    let (busy, waiting) = (lanes.to(1), lanes.to(1));
    let turn = busy.turn(limit).await.unwrap();
    let waiter = tokio::spawn(async move { waiting.turn(limit).await.is_some() });
    let began = Instant::now();
    while began.elapsed() < 2 * limit {
        tokio::time::sleep(limit / 8).await;
        turn.got_through();
    }
    drop(turn);
    assert!(waiter.await.unwrap(), "longer than the limit, as somebody got through meanwhile");
}

#[tokio::test]
async fn work_may_take_long_while_others_get_through() {
    let lanes = Lanes::new(8);
    let lane = lanes.to(1);
    let limit = Duration::from_secs(1);
    let work = |parts: u32| {
        let lane = &lane;
        async move { lane.turn(limit).await.unwrap().run(limit, tokio::time::sleep(limit / 4 * parts)).await }
    };
    assert_eq!((work(1).await, work(6).await), (Some(()), None), "nobody else got through");
    let others = async {
        loop {
            tokio::time::sleep(limit / 8).await;
            lane.turn(limit).await.unwrap().got_through();
        }
    };
    tokio::select! {
        () = others => {}
        done = async { (work(12).await, work(28).await) } => assert_eq!(done, (Some(()), None)),
    }
}

/// What may happen to a pool.
#[derive(Debug, Clone)]
enum Event {
    Enter(u8),
    Silent(usize, bool),
    Progress(usize),
    Trust(usize),
    Leave(usize),
    Later(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        5 => (0..5_u8).prop_map(Event::Enter),
        4 => any::<(usize, bool)>().prop_map(|(n, silent)| Event::Silent(n, silent)),
        1 => any::<usize>().prop_map(Event::Progress),
        1 => any::<usize>().prop_map(Event::Trust),
        1 => any::<usize>().prop_map(Event::Leave),
        2 => (0..100_u64).prop_map(Event::Later),
    ]
}

/// A member as a simple model keeps it.
struct Seen {
    place: u32,
    source: u8,
    since: Instant,
    trusted: bool,
    alarm: Arc<Alarm>,
}

impl Seen {
    fn yields(&self, after: Duration, now: Instant) -> bool {
        !self.trusted && self.alarm.is_silent() && self.since + after <= now
    }
}

proptest! {
    #[test]
    fn the_book_does_what_a_simple_model_says(events in proptest::collection::vec(event(), 1..400)) {
        let rule = rule(8, 2, Duration::from_millis(300));
        let hurry = Duration::from_millis(30);
        let mut book = Book::new();
        let mut now = Instant::now();
        let mut model: Vec<Seen> = Vec::new();
        for event in events {
            // No two things happen at the same time.
            now += Duration::from_micros(1);
            let pick = |n: usize, of: &[Seen]| if of.is_empty() { None } else { Some(n % of.len()) };
            match event {
                Event::Enter(source) => {
                    let alarm = Arc::new(Alarm::default());
                    let full = model.len() == rule.total;
                    let number = |of: u8| model.iter().filter(|m| m.source == of && !m.trusted).count();
                    let most = (0..5).map(number).max().unwrap_or(0);
                    let heaviest = |m: &Seen| most > rule.share && number(m.source) == most;
                    let oldest = |which: &dyn Fn(&Seen) -> bool| model.iter().filter(|m| which(m)).map(|m| m.since).min();
                    let hurried = oldest(&|m| heaviest(m) && m.yields(hurry, now));
                    let ripe = oldest(&|m| m.yields(rule.grace, now));
                    // Of several sources with as many only one is looked at.
                    let tied = (0..5).filter(|of| most > rule.share && number(*of) == most).count() > 1;
                    match book.enter(&source, Arc::clone(&alarm), &rule, now) {
                        Ok((place, evicted)) => {
                            prop_assert_eq!(evicted.is_some(), full);
                            if let Some(evicted) = evicted {
                                let index = model.iter().position(|m| Arc::ptr_eq(&m.alarm, &evicted)).unwrap();
                                let victim = &model[index];
                                let first = oldest(&|m| m.source == victim.source && m.yields(Duration::ZERO, now));
                                prop_assert_eq!(Some(victim.since), first, "the source's oldest that is silent");
                                if !tied {
                                    prop_assert_eq!(Some(victim.since), hurried.or(ripe));
                                }
                                model.remove(index);
                            }
                            model.push(Seen { place, source, since: now, trusted: false, alarm });
                        }
                        Err(taken) => {
                            prop_assert!(full && ripe.is_none() && (tied || hurried.is_none()), "{:?}", taken);
                            if let Taken::Until(until) = taken {
                                prop_assert!(until > now && until <= now + rule.grace);
                            }
                        }
                    }
                }
                Event::Silent(n, silent) => if let Some(n) = pick(n, &model) {
                    model[n].alarm.waits(silent);
                },
                Event::Progress(n) => if let Some(n) = pick(n, &model) {
                    let m = &mut model[n];
                    book.progress(m.place, &m.alarm, now);
                    m.since = now;
                },
                Event::Trust(n) => if let Some(n) = pick(n, &model) {
                    let m = &mut model[n];
                    book.trust(m.place, &m.alarm);
                    m.trusted = true;
                },
                Event::Leave(n) => if let Some(n) = pick(n, &model) {
                    let m = model.remove(n);
                    prop_assert!(book.leave(m.place, &m.alarm));
                    prop_assert!(!book.leave(m.place, &m.alarm));
                },
                Event::Later(ms) => now += Duration::from_millis(ms),
            }
            prop_assert!(book.len() <= rule.total);
            prop_assert_eq!(book.len(), model.len());
            for source in 0..5 {
                prop_assert_eq!(book.of(&source), model.iter().filter(|m| m.source == source).count());
            }
        }
    }
}
