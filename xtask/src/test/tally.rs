//! Reads the summaries of test runners.

use std::ops::AddAssign;

/// Tests that passed and that did not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
    }
}

/// `     Summary [   2.003s] 12/14 tests run: 9 passed (1 flaky), 2 failed, 1 timed out, 3 skipped`.
pub(super) fn nextest(line: &str) -> Option<Tally> {
    let (_, counts) = line.trim_start().strip_prefix("Summary ")?.split_once(" run: ")?;
    let failed = ["failed", "timed out", "exec failed"].iter().map(|word| number_before(counts, word)).sum();
    Some(Tally { passed: number_before(counts, "passed"), failed })
}

/// `test result: FAILED. 9 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s`.
pub(super) fn cargo_test(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    Some(Tally { passed: number_before(counts, "passed"), failed: number_before(counts, "failed") })
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
    use super::{Tally, cargo_test, nextest};

    #[test]
    fn summaries_are_read() {
        let line = "     Summary [   2.003s] 12/14 tests run: 9 passed (1 flaky), 2 failed, 1 timed out, 3 skipped";
        assert_eq!(nextest(line), Some(Tally { passed: 9, failed: 3 }));
        let line = "     Summary [   0.003s] 1 test run: 1 passed, 0 skipped";
        assert_eq!(nextest(line), Some(Tally { passed: 1, failed: 0 }));
        assert_eq!(nextest("        PASS [   0.003s] testbed app::echo"), None);
        let line = "test result: FAILED. 9 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(cargo_test(line), Some(Tally { passed: 9, failed: 2 }));
        assert_eq!(cargo_test("test result_is_ok ... ok"), None);
    }
}
