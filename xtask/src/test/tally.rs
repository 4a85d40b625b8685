//! How many tests passed and failed, and what there is to know of those that failed.

use std::ops::AddAssign;

use crate::exec::LastLines;

/// Of how many failures what they printed is kept.
const FAILURES: usize = 20;
/// Lines kept of one failure, or of one runner's account of its failures: the last ones.
const LINES: usize = 120;

/// Tests that passed and that did not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// What is told again at the end, where people look first and where logs are cut off last.
    accounts: Vec<String>,
}

impl Tally {
    /// Counts a test that failed; `account` says which and how.
    pub(crate) fn fail(&mut self, account: &str) {
        self.failed += 1;
        self.tell(account);
    }

    /// Keeps something to be told again at the end.
    pub(crate) fn tell(&mut self, account: &str) {
        if self.accounts.len() < FAILURES && !account.trim().is_empty() {
            let lines: Vec<_> = account.lines().collect();
            let (first, last) = lines.split_at(lines.len().saturating_sub(LINES));
            let mut kept = last.join("\n");
            // Which test it was is in the first line.
            if let Some(name) = first.first() {
                kept = format!("{name}\n    … {} lines …\n{kept}", first.len() - 1);
            }
            self.accounts.push(kept);
        }
    }

    /// What is known of what failed.
    pub(crate) fn accounts(&self) -> &[String] {
        &self.accounts
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
        self.accounts.extend(more.accounts);
        self.accounts.truncate(FAILURES);
    }
}

/// Who prints what is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Runner {
    Nextest,
    Cargo,
}

/// Reads what a test runner prints.
pub(super) struct Reading {
    runner: Runner,
    tally: Tally,
    /// The latest lines of its account of what failed, once that has begun.
    account: Option<LastLines>,
}

impl Reading {
    pub(super) fn of(runner: Runner) -> Self {
        Self { runner, tally: Tally::default(), account: None }
    }

    /// The next line, without colours.
    pub(super) fn take(&mut self, line: &str) {
        let counts = match self.runner {
            Runner::Nextest => nextest(line),
            Runner::Cargo => cargo_test(line),
        };
        // nextest tells of failures behind its counts, and cargo test before them.
        if self.runner == Runner::Cargo && (line == "failures:" || counts.is_some()) {
            self.end_account();
        }
        let begins = match self.runner {
            Runner::Nextest => counts.as_ref().is_some_and(|counts| counts.failed > 0),
            Runner::Cargo => line == "failures:",
        };
        if begins {
            self.account = Some(LastLines::new(LINES));
        } else if let Some(account) = &mut self.account {
            account.push(line);
        }
        if let Some(counts) = counts {
            self.tally += counts;
        }
    }

    /// What was read.
    pub(super) fn end(mut self) -> Tally {
        self.end_account();
        self.tally
    }

    fn end_account(&mut self) {
        if let Some(lines) = self.account.take() {
            self.tally.tell(&lines.text());
        }
    }
}

/// `     Summary [   2.003s] 12/14 tests run: 9 passed (1 flaky), 2 failed, 1 timed out, 3 skipped`.
fn nextest(line: &str) -> Option<Tally> {
    let (_, counts) = line.trim_start().strip_prefix("Summary ")?.split_once(" run: ")?;
    let failed = ["failed", "timed out", "exec failed"].iter().map(|word| number_before(counts, word)).sum();
    Some(Tally { passed: number_before(counts, "passed"), failed, ..Tally::default() })
}

/// `test result: FAILED. 9 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s`.
fn cargo_test(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    Some(Tally { passed: number_before(counts, "passed"), failed: number_before(counts, "failed"), ..Tally::default() })
}

/// The number in the part of `counts` that is `<number> <word>` and perhaps more in brackets.
fn number_before(counts: &str, word: &str) -> usize {
    let parts = counts.split([',', ';']).map(str::trim);
    let found = parts.filter_map(|part| part.split_once(' ')).find(|(_, rest)| {
        let rest = rest.split(" (").next().unwrap_or_default();
        rest == word
    });
    found.and_then(|(number, _)| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{FAILURES, LINES, Reading, Runner, Tally};

    fn read(runner: Runner, text: &str) -> Tally {
        let mut reading = Reading::of(runner);
        text.lines().for_each(|line| reading.take(line));
        reading.end()
    }

    fn counts(tally: &Tally) -> (usize, usize) {
        (tally.passed, tally.failed)
    }

    #[test]
    fn summaries_are_read() {
        let line = "     Summary [   2.003s] 12/14 tests run: 9 passed (1 flaky), 2 failed, 1 timed out, 3 skipped";
        assert_eq!(counts(&read(Runner::Nextest, line)), (9, 3));
        let line = "     Summary [   0.003s] 1 test run: 1 passed, 0 skipped";
        assert_eq!(counts(&read(Runner::Nextest, line)), (1, 0));
        assert_eq!(read(Runner::Nextest, "        PASS [   0.003s] testbed app::echo"), Tally::default());
        let line = "test result: FAILED. 9 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(counts(&read(Runner::Cargo, line)), (9, 2));
        assert_eq!(read(Runner::Cargo, "test result_is_ok ... ok"), Tally::default());
    }

    #[test]
    fn accounts_of_failures_are_kept() {
        let text = "        PASS [   0.003s] testbed app::echo\n\
                    ────────────\n     Summary [   2.0s] 2 tests run: 1 passed, 1 failed, 0 skipped\n        \
                    FAIL [   1.0s] testbed app::other\n  stderr ───\n    assertion failed: it works\n";
        let tally = read(Runner::Nextest, text);
        let [account] = tally.accounts() else { panic!("one account: {tally:?}") };
        assert!(account.starts_with("        FAIL [   1.0s] testbed app::other\n"), "{account}");
        assert!(account.ends_with("assertion failed: it works"), "{account}");
        assert!(read(Runner::Nextest, "  Summary [ 2.0s] 1 test run: 1 passed\nmore\n").accounts().is_empty());

        let text = "test one ... FAILED\n\nfailures:\n\n---- one stdout ----\nit does not work\n\nfailures:\n    one\n\n\
                    test result: FAILED. 0 passed; 1 failed; 0 ignored\n\ntest two ... ok\n\
                    test result: ok. 1 passed; 0 failed; 0 ignored\n";
        let tally = read(Runner::Cargo, text);
        assert_eq!(counts(&tally), (1, 1));
        let all = tally.accounts().join("\n");
        assert!(all.contains("---- one stdout ----\nit does not work"), "{all}");
        assert!(!all.contains("test two"), "{all}");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut tally = Tally::default();
        for test in 0..2 * FAILURES {
            let lines: Vec<_> = (0..2 * LINES).map(|line| format!("line {line}")).collect();
            tally.fail(&format!("test {test}\n{}", lines.join("\n")));
        }
        assert_eq!((tally.failed, tally.accounts().len()), (2 * FAILURES, FAILURES));
        let account = &tally.accounts()[1];
        assert_eq!(account.lines().count(), LINES + 2);
        assert!(account.starts_with("test 1\n") && account.ends_with(&format!("line {}", 2 * LINES - 1)), "{account}");

        let text = "x\n".repeat(2 * LINES);
        let tally = read(Runner::Nextest, &format!("Summary [ 2.0s] 1 test run: 0 passed, 1 failed\n{text}"));
        assert_eq!(tally.accounts()[0].lines().count(), LINES);
    }
}
