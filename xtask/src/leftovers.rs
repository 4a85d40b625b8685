//! What earlier runs left on this machine when they were killed.

use testbed::Testbed;

use crate::ui::Ui;

/// Removes what testbeds of dead processes left. What resists is named and left alone: names have
/// the number of the process, so it is in nobody's way, and it is no reason to refuse a run.
pub(crate) fn sweep(ui: &Ui) {
    if let Err(error) = Testbed::sweep() {
        ui.say(&format!("An earlier run, which was killed, left something that this run does without: {error:#}"));
    }
}
