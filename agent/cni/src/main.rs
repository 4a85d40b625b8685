//! The program that a container runtime starts.

use std::process::ExitCode;

fn main() -> ExitCode {
    underpass_cni::main()
}
