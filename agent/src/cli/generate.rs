//! What is generated from the definition of the command line: completions, man pages, the reference in `docs/cli.md`.

use std::{fmt::Write as _, fs, path::PathBuf};

use anyhow::Context as _;
use clap::{Args, Command, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, exit::EXIT_CODES, output};

/// Columns of the reference's texts.
const WIDTH: usize = 100;

/// Arguments of `underpass completions`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

Examples:
  underpass completions bash > /usr/share/bash-completion/completions/underpass
  underpass completions zsh > /usr/local/share/zsh/site-functions/_underpass"))]
pub(super) struct CompletionsArgs {
    /// For which shell.
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

/// Arguments of `underpass man`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXIT_CODES}

One page for each command, `underpass.1`, `underpass-connections.1` and so on. Files of
these names are replaced.

Examples:
  underpass man --dir /usr/local/share/man/man1"))]
pub(super) struct ManArgs {
    /// Directory to write to; made when there is none.
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

/// The command line without what depends on the machine: environment variables are named, their values are not shown.
fn definition() -> Command {
    fn without_values(command: Command) -> Command {
        command.mut_args(|a| a.hide_env_values(true)).mut_subcommands(without_values)
    }
    let mut command = without_values(Cli::command()).term_width(WIDTH);
    command.build();
    command
}

pub(super) fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "underpass", &mut text);
    output::write(&String::from_utf8(text).context("the completions are not UTF-8")?).map(drop)
}

pub(super) fn man(args: &ManArgs) -> anyhow::Result<()> {
    fs::create_dir_all(&args.dir).with_context(|| format!("making directory {}", args.dir.display()))?;
    clap_mangen::generate_to(definition(), &args.dir)
        .with_context(|| format!("writing man pages to {}", args.dir.display()))
}

/// The reference as Markdown: the help of every command.
pub(super) fn reference() -> String {
    let mut text = "# Command line\n\nGenerated from the program; `underpass COMMAND --help` prints the same. \
        See [operations](operations.md) for what to look at when.\n"
        .to_owned();
    section(&mut text, &mut definition(), "", 2);
    text
}

fn section(text: &mut String, command: &mut Command, parent: &str, level: usize) {
    let name =
        if parent.is_empty() { command.get_name().to_owned() } else { format!("{parent} {}", command.get_name()) };
    let help = command.render_long_help().to_string();
    let _ = write!(text, "\n{} {name}\n\n```text\n", "#".repeat(level.min(4)));
    for line in help.trim_end().lines() {
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text.push_str("```\n");
    for sub in command.get_subcommands_mut().filter(|c| !c.is_hide_set()) {
        section(text, sub, &name, level + 1);
    }
}
