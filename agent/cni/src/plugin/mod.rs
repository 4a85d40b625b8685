//! The plugin: one command of the CNI specification (0.3.0 to 1.1.0), then it ends.
//!
//! It makes no network. `ADD` hands the pod's network namespace to the agent and answers the runtime with the previous
//! plugin's result once the agent has captured the pod, so that none of its containers runs before. Without that, the
//! runtime is told to try again: a pod that has to be in the mesh never starts outside of it.

mod agent;
mod commands;
mod config;
mod environment;
mod failure;
mod result;

use std::{
    env,
    io::{self, Read, Write},
    process::ExitCode,
};

pub use config::Config;
pub use environment::{Subject, Variables, Verb, pod};
pub use failure::{Code, Failure};
pub use result::Previous;

use crate::conflist::{SUPPORTED, SpecVersion};

/// What somebody sees who starts the program by hand.
const ABOUT: &str = concat!(
    "underpass-cni ",
    env!("CARGO_PKG_VERSION"),
    ": CNI plugin of Underpass. A container runtime starts it, behind the plugins that make a pod's network; the \
     Underpass agent installs it."
);

/// The program.
pub fn main() -> ExitCode {
    let variables = |name: &str| env::var_os(name);
    run(&variables, &mut io::stdin().lock(), &mut io::stdout().lock(), &mut io::stderr().lock())
}

fn run(
    variables: &impl Variables,
    stdin: &mut impl Read,
    stdout: &mut impl Write,
    stderr: &mut impl Write,
) -> ExitCode {
    if variables.get("CNI_COMMAND").is_none_or(|command| command.is_empty()) {
        let _ = writeln!(stderr, "{ABOUT}\nCNI protocol versions supported: {}", SpecVersion::supported());
    }
    let mut input = Vec::new();
    let (answer, code) = match respond(variables, stdin, &mut input, stderr) {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(failure) => (Some(failure.to_json(&Config::version_of(&input))), ExitCode::FAILURE),
    };
    match answer.map_or(Ok(()), |answer| writeln!(stdout, "{answer}").and_then(|()| stdout.flush())) {
        Ok(()) => code,
        Err(error) => {
            let _ = writeln!(stderr, "underpass-cni: writing the answer: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What goes to standard output. `input` is what came from standard input, also when it was of no use.
fn respond(
    variables: &impl Variables,
    stdin: &mut impl Read,
    input: &mut Vec<u8>,
    stderr: &mut impl Write,
) -> Result<Option<String>, Failure> {
    let verb = Verb::parse(&variables.text("CNI_COMMAND")?)?;
    let read = stdin.take(config::LIMIT + 1).read_to_end(input);
    match verb {
        Verb::Version => return Ok(Some(version(input))),
        // A failed DEL keeps the pod's name reserved, and the agent notices a namespace's end by itself.
        Verb::Del => commands::del(variables, input, stderr),
        _ => {
            read.map_err(|error| Failure::new(Code::Io, format!("reading standard input: {error}")))?;
            let config = Config::parse(input)?;
            match verb {
                Verb::Add => return commands::add(&config, variables, stderr).map(Some),
                Verb::Check => commands::check(&config, variables, stderr)?,
                Verb::Gc => commands::gc(&config, stderr)?,
                Verb::Status => commands::status(&config, stderr)?,
                Verb::Version | Verb::Del => unreachable!("answered above"),
            }
        }
    }
    Ok(None)
}

fn version(input: &[u8]) -> String {
    let versions = SUPPORTED.map(|version| format!("\"{version}\"")).join(",");
    format!("{{\"cniVersion\":\"{}\",\"supportedVersions\":[{versions}]}}", Config::version_of(input))
}
