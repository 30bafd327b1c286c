//! The `torpor` command: a client of torpord's HTTP API, and `doctor`, which tries what a host can do.
//!
//! | module | owns |
//! |---|---|
//! | `args` | the command line, its help and examples |
//! | `parse` | durations, sizes and pairs as people write them |
//! | `client` | one HTTP call to torpord over its unix socket or TCP |
//! | `output` | tables, times, and stdout that may be closed |
//! | `commands` | one function per command |
//! | `template` | templates made from tarballs, directories and images |
//!
//! One thread, one call at a time; every command ends in an exit code that `main` alone hands over.

#![forbid(unsafe_code)]

mod args;
mod client;
mod commands;
mod output;
mod parse;
mod template;

use args::Arguments;
use clap::Parser;
use client::CallError;
use output::ClosedPipe;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::from(error).context("cannot start"), 1),
    };
    let failure_code = arguments.command.failure_code();
    match runtime.block_on(commands::run(arguments)) {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is::<ClosedPipe>() => ExitCode::SUCCESS,
        Err(error) => fail(&error, failure_code),
    }
}

/// Prints what failed and what to do about it; a closed stderr is nobody's concern.
fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    let mut stderr = std::io::stderr().lock();
    let api = error.downcast_ref::<CallError>();
    let _ = match api {
        Some(CallError::Api(refused)) => {
            writeln!(
                stderr,
                "error: {error:#}\n  what to do: {}",
                refused.suggested_action
            )
        }
        Some(other) => writeln!(
            stderr,
            "error: {error:#}\n  what to do: {}",
            other.suggested_action()
        ),
        None => writeln!(stderr, "error: {error:#}"),
    };
    ExitCode::from(
        api.and_then(CallError::exec_exit_code)
            .filter(|_| code >= 125)
            .unwrap_or(code),
    )
}
