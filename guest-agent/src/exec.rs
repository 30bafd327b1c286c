//! Running processes for the host.
//!
//! An exec has a thread of its own from the request to the answer; what goes on in between is one
//! event loop ([`session`]) over the socket, the process's pipes and its end. The process leads a
//! session and a group of its own, so that signals reach everything it started.

mod background;
mod command;
mod link;
mod orphaned_output;
mod session;
mod streams;

use crate::accounts::AccountError;
use crate::children::{Child, Children};
use crate::errors::Failed;
use crate::sys::spawn::{self, Program, Step, Streams};
use crate::wire;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use orphaned_output::OrphanedOutput;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use torpor_api::guest::ExecSpec;

/// Why a process was not started or not seen to its end.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The request contradicts itself or a limit.
    #[error("{0}")]
    BadSpec(String),
    /// No such user.
    #[error(transparent)]
    Account(#[from] AccountError),
    /// The child could not become the program.
    #[error("cannot {what}")]
    Start {
        /// Where it failed.
        step: Step,
        /// What was tried, with operands.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Pipes, terminals, logs.
    #[error("cannot {operation}")]
    Os {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The client sent what it must not.
    #[error("{0}")]
    Protocol(String),
}

impl ExecError {
    fn os(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { operation, source }
    }
}

/// What all execs share.
#[derive(Debug)]
pub struct Execs {
    /// Everything that runs.
    pub children: Children,
    logs: PathBuf,
    open_files: (u64, u64),
    orphaned_output: OrphanedOutput,
}

impl Execs {
    /// Logs of background processes go below `run_dir`; children get this limit of open files.
    pub fn new(run_dir: &std::path::Path, open_files: (u64, u64)) -> Self {
        Self {
            children: Children::default(),
            logs: run_dir.join("exec"),
            open_files,
            orphaned_output: OrphanedOutput::default(),
        }
    }

    /// Run a process and answer on `socket`; returns when both are done.
    pub fn serve(&self, mut socket: UnixStream, spec: &ExecSpec) {
        let result = if spec.background {
            background::run(self, &mut socket, spec)
        } else {
            session::run(self, &mut socket, spec)
        };
        match result {
            Ok(Some(response)) => wire::finish(&mut socket, Ok(response)),
            Ok(None) => {}
            Err(error) => wire::finish(&mut socket, Err(Failed::from(error).0)),
        }
    }

    fn start(&self, program: &Program, streams: &Streams<'_>) -> Result<Arc<Child>, ExecError> {
        let (report, reporter) = pipe2(OFlag::O_CLOEXEC)
            .map_err(io::Error::from)
            .map_err(ExecError::os("make a pipe"))?;
        let child = self
            .children
            .start(|| spawn::fork_exec(program, streams, &reporter))
            .map_err(ExecError::os("fork"))?;
        drop(reporter);
        match spawn::read_report(report).map_err(ExecError::os("watch a process start"))? {
            None => Ok(child),
            Some(failure) => Err(start_error(program, failure)),
        }
    }
}

fn start_error(program: &Program, failure: spawn::Failure) -> ExecError {
    let name = program
        .argv
        .first()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let what = match failure.step {
        Step::Session => format!("make a session for {name}"),
        Step::User => format!("become the user for {name}"),
        Step::Directory => format!("enter directory {}", program.cwd.to_string_lossy()),
        Step::Exec => format!("execute {name}"),
    };
    ExecError::Start {
        step: failure.step,
        what,
        source: failure.source,
    }
}
