//! How the tests of one machine went.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use vm_guest::{Report, Test};

use crate::test::Tally;

/// Tests that the closing lines name because they took longest.
const LONGEST: usize = 15;

/// Counts, and what is not over yet.
pub(super) struct Outcome {
    /// How the kernel is called in every line.
    label: String,
    tests: Vec<Test>,
    running: BTreeSet<usize>,
    /// Tests that failed and had another try.
    retried: BTreeSet<usize>,
    passed: BTreeSet<usize>,
    /// Seconds, all tries together.
    took: BTreeMap<usize, f64>,
    /// With what was said of it.
    failed: BTreeMap<usize, String>,
}

impl Outcome {
    pub(super) fn new(label: String, tests: Vec<Test>) -> Self {
        let none = BTreeSet::new;
        Self {
            label,
            tests,
            running: none(),
            retried: none(),
            passed: none(),
            took: BTreeMap::new(),
            failed: BTreeMap::new(),
        }
    }

    /// Takes a report in; what there is to say about it.
    pub(super) fn take(&mut self, report: Report) -> Option<String> {
        match report {
            Report::Started { test } => {
                self.running.insert(test);
                None
            }
            Report::Ended { test, failure, again, seconds, output } => {
                *self.took.entry(test).or_default() += seconds;
                let word = match (&failure, again) {
                    (_, true) => {
                        self.retried.insert(test);
                        "RETRY"
                    }
                    (None, false) => {
                        self.passed.insert(test);
                        if self.retried.contains(&test) { "FLAKY" } else { "PASS" }
                    }
                    (Some(_), false) => "FAIL",
                };
                if !again {
                    self.running.remove(&test);
                }
                let mut line = format!("{word:>8} [{seconds:8.1}s] {} {}", self.label, self.name(test));
                if let Some(failure) = &failure {
                    let _ = write!(line, ": {failure}");
                    for printed in output.lines() {
                        let _ = write!(line, "\n    {printed}");
                    }
                }
                if failure.is_some() && !again {
                    self.failed.insert(test, line.clone());
                }
                Some(line)
            }
            Report::Ready { .. }
            | Report::Said { .. }
            | Report::Finished { .. }
            | Report::Done
            | Report::Broken { .. } => None,
        }
    }

    /// How many tests passed so far.
    pub(super) fn passed(&self) -> usize {
        self.passed.len()
    }

    /// How many tests passed, and how many did not, with those that were never run to an end.
    pub(super) fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        tally.passed = self.passed.len();
        for account in self.failed.values() {
            tally.tell(account);
        }
        tally.failed = self.tests.len() - tally.passed;
        tally
    }

    /// Names of the tests that are running.
    pub(super) fn running(&self) -> Vec<String> {
        self.running.iter().map(|test| self.name(*test)).collect()
    }

    /// The closing lines.
    pub(super) fn summary(&self, seconds: f64) -> String {
        let flaky: BTreeSet<_> = self.retried.intersection(&self.passed).copied().collect();
        let (passed, failed) = (self.passed.len(), self.failed.len());
        let mut text = format!(" Summary [{seconds:8.1}s] {} {passed} passed", self.label);
        if !flaky.is_empty() {
            let _ = write!(text, " ({} flaky)", flaky.len());
        }
        let _ = write!(text, ", {failed} failed");
        let not_run = self.tests.len() - passed - failed;
        if not_run > 0 {
            let _ = write!(text, ", {not_run} not run to an end");
        }
        for test in self.longest() {
            let _ = write!(text, "\n    LONG [{:8.1}s] {} {}", self.took[&test], self.label, self.name(test));
        }
        let failed = self.failed.keys().copied().collect();
        for (word, tests) in [("FLAKY", &flaky), ("FAIL", &failed)] {
            for test in tests {
                let _ = write!(text, "\n{word:>8} {} {}", self.label, self.name(*test));
            }
        }
        text
    }

    /// What took longest, the longest first.
    fn longest(&self) -> Vec<usize> {
        let mut all: Vec<_> = self.took.iter().map(|(test, seconds)| (*seconds, *test)).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        all.into_iter().take(LONGEST).map(|(_, test)| test).collect()
    }

    fn name(&self, test: usize) -> String {
        self.tests.get(test).map_or_else(|| format!("test {test}"), |test| format!("{} {}", test.suite, test.name))
    }
}

#[cfg(test)]
mod tests {
    use vm_guest::{Report, Test};

    use super::Outcome;

    fn tests() -> Vec<Test> {
        let test = |name: &str| Test {
            suite: "e2e".into(),
            name: name.into(),
            program: "/e2e".into(),
            directory: "/".into(),
            retries: 1,
            limit: 10,
        };
        ["one", "two", "three", "four"].map(test).into()
    }

    fn ended(test: usize, failure: Option<&str>, again: bool) -> Report {
        Report::Ended { test, failure: failure.map(Into::into), again, seconds: 1.25, output: "said".into() }
    }

    #[test]
    fn passes_second_tries_failures_and_what_was_cut_off_are_counted() {
        let mut outcome = Outcome::new("6.1".into(), tests());
        for test in 0..4 {
            assert_eq!(outcome.take(Report::Started { test }), None);
        }
        assert_eq!(outcome.take(ended(0, None, false)).unwrap(), "    PASS [     1.2s] 6.1 e2e one");
        let line = outcome.take(ended(1, Some("exit status 101"), true)).unwrap();
        assert_eq!(line, "   RETRY [     1.2s] 6.1 e2e two: exit status 101\n    said");
        assert_eq!(outcome.take(ended(1, None, false)).unwrap(), "   FLAKY [     1.2s] 6.1 e2e two");
        outcome.take(ended(2, Some("exit status 101"), true));
        let line = outcome.take(ended(2, Some("still running after 10 s"), false)).unwrap();
        assert!(line.starts_with("    FAIL [     1.2s] 6.1 e2e three: still running after 10 s\n"), "{line}");
        assert_eq!(outcome.running(), ["e2e four"]);
        let tally = outcome.tally();
        assert_eq!((tally.passed, tally.failed), (2, 2));
        assert!(
            tally.accounts()[0].starts_with("    FAIL [     1.2s] 6.1 e2e three: still running after 10 s\n    said")
        );
        let summary = outcome.summary(20.0);
        assert!(summary.contains("6.1 2 passed (1 flaky), 1 failed, 1 not run to an end"), "{summary}");
        assert!(summary.contains("FLAKY 6.1 e2e two") && summary.contains("FAIL 6.1 e2e three"), "{summary}");
    }
}
