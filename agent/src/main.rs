//! The `underpass` binary.

fn main() -> std::process::ExitCode {
    underpass::cli::main()
}
