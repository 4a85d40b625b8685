//! The tests that need a control plane, and those that need a whole cluster: targets of their own, because others run without anything
//! that has to be built first.

use anyhow::{Result, ensure};
use nix::unistd::geteuid;

use super::parts::{self, Group};
use crate::{
    leftovers, setup,
    test::{self, Tally},
    ui::Ui,
};

pub(super) fn run(ui: &Ui, filter: Option<&str>) -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "the tests make network namespaces and load BPF programs: run them as root (sudo -E cargo xtask cluster test)"
    );
    setup::ensure(ui)?;
    leftovers::sweep(ui);
    test::build(ui)?;
    let mut total = run_all(ui, filter, false)?;
    total += install(ui, filter)?;
    test::close(ui, total, filter)
}

/// Makes the programs of a whole cluster and runs the scenarios on one. The programs under test are built.
pub(crate) fn install(ui: &Ui, filter: Option<&str>) -> Result<Tally> {
    parts::ensure(ui, &[Group::Tests, Group::Chart, Group::Playground])?;
    test::install(ui, filter)
}

/// Makes what the tests need and runs them; `full`: also those marked ignored. The programs under test are built.
pub(crate) fn run_all(ui: &Ui, filter: Option<&str>, full: bool) -> Result<Tally> {
    parts::ensure(ui, &[Group::Tests, Group::Chart])?;
    test::kubernetes(ui, filter, full)
}
