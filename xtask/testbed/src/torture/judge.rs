//! What an end may see.

use super::plan::{Act, Plan, Side, SidePlan};

/// What an end of a connection did and saw.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Bytes that its kernel took.
    pub sent: u64,
    /// Bytes that came and were right.
    pub received: u64,
    /// How reading ended.
    pub read_end: ReadEnd,
    /// Name of the error with which writing ended.
    pub write_error: Option<String>,
    /// What was wrong with the bytes that came.
    pub wrong: Option<String>,
}

/// How reading ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ReadEnd {
    /// It has not, and the time is up.
    #[default]
    Open,
    /// The other's end came.
    End,
    /// An error, by name. Also what looks like an end after writing has met the error: the kernel tells it only once.
    Error(String),
    /// This end left by itself.
    Stopped,
}

impl ReadEnd {
    /// For counting.
    pub fn name(&self) -> &str {
        match self {
            Self::Open => "open",
            Self::End => "end",
            Self::Error(name) if is_reset(name) => "reset",
            Self::Error(name) => name,
            Self::Stopped => "stopped",
        }
    }
}

/// `EPIPE` is a reset that comes after the other's end, `ECONNABORTED` one that was lost: the agent ends the application's socket instead.
fn is_reset(name: &str) -> bool {
    matches!(name, "ECONNRESET" | "EPIPE" | "ECONNABORTED")
}

/// Whether `side` may see this. On endless connections, of which one end is killed, `least` is how much that end had certainly sent.
pub fn judge(plan: &Plan, side: Side, outcome: &Outcome, least: u64) -> Result<(), String> {
    let (own, peer) = (plan.side(side), plan.side(side.other()));
    let Outcome { sent, received, read_end, write_error, wrong } = outcome;
    if let Some(wrong) = wrong {
        return Err(wrong.clone());
    }
    for name in write_error.iter().chain(match read_end {
        ReadEnd::Error(name) => Some(name),
        _ => None,
    }) {
        if !is_reset(name) {
            return Err(format!("{name} after {received} bytes received and {sent} sent"));
        }
        if !plan.endless && !may_reset(peer, own) {
            return Err(format!("a reset that nobody sent, after {received} of {} bytes received", peer.total));
        }
    }
    match read_end {
        ReadEnd::Open => {
            Err(format!("it hangs, after {received} of {} bytes received and {sent} of {} sent", peer.total, own.total))
        }
        ReadEnd::End if plan.endless && *received < least => {
            Err(format!("a clean end after {received} bytes, but the other end had sent {least} before it was killed"))
        }
        ReadEnd::End if plan.endless => Ok(()),
        ReadEnd::End if *received != peer.total => Err(format!("a clean end after {received} of {} bytes", peer.total)),
        ReadEnd::End if !peer.ends() => {
            Err(format!("a clean end after {received} bytes, but the other end only resets"))
        }
        ReadEnd::End if own.last.is_none() && write_error.is_none() && *sent != own.total => {
            Err(format!("it gave up after {sent} of {} bytes sent", own.total))
        }
        ReadEnd::Stopped if own.last.is_none() => Err("it stopped by itself".to_owned()),
        ReadEnd::End | ReadEnd::Error(_) | ReadEnd::Stopped => Ok(()),
    }
}

/// Whether what `peer` does can be a reset for an end that does `own`: what is sent to somebody who has closed is answered with one.
fn may_reset(peer: &SidePlan, own: &SidePlan) -> bool {
    match peer.last {
        Some((Act::Reset, _)) => true,
        Some((Act::Close, _)) => own.total > 0,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::plan::{Act, Plan, Scenario, Side, Trigger},
        Outcome, ReadEnd, judge,
    };

    /// The client sends 10 bytes and the server 20; both half-close.
    fn plan() -> Plan {
        let mut plan = Plan::new(Scenario::Mixed, 1, 1);
        (plan.sides[0].total, plan.sides[1].total) = (10, 20);
        plan
    }

    fn ended(received: u64, read_end: ReadEnd) -> Outcome {
        Outcome { sent: 10, received, read_end, ..Outcome::default() }
    }

    fn client(plan: &Plan, outcome: &Outcome) -> Result<(), String> {
        judge(plan, Side::Client, outcome, 0)
    }

    fn reset() -> ReadEnd {
        ReadEnd::Error("ECONNRESET".into())
    }

    #[test]
    fn a_clean_end_needs_everything() {
        assert_eq!(client(&plan(), &ended(20, ReadEnd::End)), Ok(()));
        for received in [0, 19, 21] {
            let what = client(&plan(), &ended(received, ReadEnd::End)).unwrap_err();
            assert_eq!(what, format!("a clean end after {received} of 20 bytes"));
        }
    }

    #[test]
    fn wrong_bytes_hanging_and_stopping_are_failures() {
        let wrong = Outcome { wrong: Some("byte 3 is wrong".into()), ..ended(20, ReadEnd::End) };
        assert_eq!(client(&plan(), &wrong).unwrap_err(), "byte 3 is wrong");
        assert!(client(&plan(), &ended(20, ReadEnd::Open)).unwrap_err().starts_with("it hangs"));
        assert!(client(&plan(), &ended(20, ReadEnd::Stopped)).is_err());
        let early = Outcome { sent: 9, ..ended(20, ReadEnd::End) };
        assert!(client(&plan(), &early).unwrap_err().contains("9 of 10 bytes sent"));
    }

    #[test]
    fn a_reset_needs_somebody_who_resets() {
        let mut plan = plan();
        assert!(client(&plan, &ended(20, reset())).unwrap_err().contains("nobody sent"));
        let unwritten = Outcome { write_error: Some("EPIPE".into()), ..ended(20, ReadEnd::End) };
        assert!(client(&plan, &unwritten).is_err());
        plan.sides[1].last = Some((Act::Reset, Trigger::Sent));
        assert_eq!(client(&plan, &ended(5, reset())), Ok(()));
        assert_eq!(client(&plan, &unwritten), Ok(()));
        assert!(client(&plan, &ended(5, ReadEnd::Error("ETIMEDOUT".into()))).unwrap_err().starts_with("ETIMEDOUT"));
    }

    #[test]
    fn a_reset_is_never_a_clean_end() {
        let mut plan = plan();
        plan.sides[1].half_close = None;
        plan.sides[1].last = Some((Act::Reset, Trigger::Sent));
        assert!(client(&plan, &ended(20, ReadEnd::End)).unwrap_err().contains("only resets"));
        plan.sides[1].last = Some((Act::Close, Trigger::Sent));
        assert_eq!(client(&plan, &ended(20, ReadEnd::End)), Ok(()));
    }

    #[test]
    fn somebody_who_closes_resets_only_who_still_sends() {
        let mut plan = plan();
        plan.sides[1].last = Some((Act::Close, Trigger::Sent));
        assert_eq!(client(&plan, &ended(20, reset())), Ok(()));
        plan.sides[0].total = 0;
        assert!(client(&plan, &ended(20, reset())).is_err());
    }

    #[test]
    fn what_a_killed_application_had_sent_comes_before_its_end() {
        let plan = Plan::new(Scenario::Kill, 1, 1);
        let seen = |received, end| judge(&plan, Side::Server, &ended(received, end), 1000);
        assert_eq!(seen(1000, ReadEnd::End), Ok(()));
        assert_eq!(seen(5000, ReadEnd::End), Ok(()));
        assert_eq!(seen(10, reset()), Ok(()));
        assert!(seen(999, ReadEnd::End).unwrap_err().contains("had sent 1000"));
        assert!(seen(2000, ReadEnd::Open).is_err());
    }
}
