//! demo
use crate::ui::Ui;
use anyhow::Result;
#[derive(clap::Args)]
pub(crate) struct Options {}
pub(crate) fn run(_: &Ui, _: &Options) -> Result<()> {
    Ok(())
}
