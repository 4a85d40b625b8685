//! Grace periods of RCU that do not wait for every processor's next tick.
//!
//! A tcx program is attached under the lock of the whole machine's network configuration, and the kernel then waits for a grace period:
//! 16 ms on an idle machine, in which no other interface can be changed. Kernels can ask the processors instead of waiting for them
//! (`rcupdate.rcu_expedited` of the kernel's parameters), which takes a tenth of a millisecond, and costs each busy processor an
//! interrupt.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::contained;

/// The switch, of the whole machine. Any number but 0 is on; where `rcu_normal` is on, as on real-time machines, it does nothing.
const SWITCH: &str = "/sys/kernel/rcu_expedited";
/// What is written there, so that nobody else's setting is taken for ours, and what an agent that was killed has left is known: "UP".
const OURS: &str = "21840";
const OFF: &str = "0";

/// While one of these exists, grace periods are short, if the switch can be written. What somebody else has set stays.
#[derive(Debug)]
pub struct ShortGracePeriods(&'static Switch);

#[derive(Debug)]
struct Switch {
    file: PathBuf,
    holders: Mutex<usize>,
}

impl ShortGracePeriods {
    /// Turns the switch on.
    pub fn begin() -> Self {
        static REAL: std::sync::LazyLock<Switch> = std::sync::LazyLock::new(|| Switch::new(Path::new(SWITCH)));
        REAL.hold();
        Self(&REAL)
    }
}

impl Drop for ShortGracePeriods {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl Switch {
    fn new(file: &Path) -> Self {
        Self { file: file.to_owned(), holders: Mutex::default() }
    }

    fn holders(&self) -> MutexGuard<'_, usize> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is(&self, value: &str) -> bool {
        fs::read_to_string(&self.file).is_ok_and(|text| text.trim_end() == value)
    }

    fn set(&self, value: &str) {
        if let Err(error) = contained::write_setting(&self.file, value) {
            tracing::debug!(file = %self.file.display(), %error, "grace periods stay as long as they are");
        }
    }

    fn hold(&self) {
        let mut holders = self.holders();
        *holders += 1;
        if *holders == 1 && self.is(OFF) {
            self.set(OURS);
        }
    }

    fn release(&self) {
        let mut holders = self.holders();
        *holders -= 1;
        // Also what an agent has left that was killed; another one that runs only becomes slower.
        if *holders == 0 && self.is(OURS) {
            self.set(OFF);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switch_is_on_while_somebody_holds_it_and_others_settings_stay() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("rcu_expedited");
        let switch = Switch::new(&file);
        let value = || fs::read_to_string(&file).unwrap();
        fs::write(&file, "0\n").unwrap();
        switch.hold();
        switch.hold();
        assert_eq!(value(), OURS);
        switch.release();
        assert_eq!(value(), OURS);
        switch.release();
        assert_eq!(value(), OFF);

        fs::write(&file, "1\n").unwrap();
        switch.hold();
        switch.release();
        assert_eq!(value(), "1\n");

        // Of an agent that was killed meanwhile.
        fs::write(&file, format!("{OURS}\n")).unwrap();
        switch.hold();
        switch.release();
        assert_eq!(value(), OFF);

        // A kernel without it.
        fs::remove_file(&file).unwrap();
        switch.hold();
        switch.release();
        assert!(!file.exists());
    }
}
