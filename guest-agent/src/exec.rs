//! Running processes for the host.
//!
//! A process has a thread of its own from its start to its end; what goes on in between is one event loop
//! ([`session`]) over its clients' sockets, its pipes and its end. The process leads a session and a group of its
//! own, so that signals reach everything it started. [`table`] knows what runs and what ended.

mod attach;
mod client;
mod command;
mod kept_output;
mod link;
mod orphaned_output;
mod session;
mod streams;
mod table;

use crate::accounts::AccountError;
use crate::children::{Child, Children, SignalError};
use crate::errors::Failed;
use crate::sys::process::signal_group;
use crate::sys::spawn::{self, Program, Step, Streams};
use crate::wire;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use orphaned_output::OrphanedOutput;
use session::Session;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::{start_under_terminal, start_with_pipes};
use table::Table;
use torpor_api::guest::{ExecSpec, GuestResponse, ProcessEntry};

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
    /// No process of this PID was started by an exec, or it is forgotten.
    #[error("no process with PID {0} was started by an exec")]
    NoProcess(u32),
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
    table: Table,
    open_files: (u64, u64),
    orphaned_output: OrphanedOutput,
}

impl Execs {
    /// Children get this limit of open files.
    pub fn new(open_files: (u64, u64)) -> Self {
        Self {
            children: Children::default(),
            table: Table::default(),
            open_files,
            orphaned_output: OrphanedOutput::default(),
        }
    }

    /// What runs, and what ended last.
    pub fn processes(&self) -> Vec<ProcessEntry> {
        self.table.entries()
    }

    /// Signal the group of a process, also of one that ended and left others of its group behind.
    pub fn signal(&self, pid: i32, signal: i32) -> Result<(), SignalError> {
        let outcome = self.children.signal(pid, signal);
        match outcome {
            Err(SignalError::Unknown(_)) if self.left_a_group(pid) => {
                signal_group(pid, signal).map_err(|source| SignalError::Refused { pid, signal, source })
            }
            outcome => outcome,
        }
    }

    /// Did one of ours have this PID, and does somebody live in the session that it made? The kernel gives the
    /// number to nobody else as long as that is so.
    fn left_a_group(&self, pid: i32) -> bool {
        let is_ours = u32::try_from(pid).is_ok_and(|pid| self.table.find(pid, None).is_some());
        is_ours && session_has_members(pid)
    }

    /// Run a process and answer on `socket`; returns when both are done.
    pub fn serve(&self, mut socket: UnixStream, spec: &ExecSpec) {
        let begun = self.begin(spec);
        let (session, pid) = match begun {
            Ok(begun) => begun,
            Err(error) => return wire::finish(&mut socket, Err(Failed::from(error).0)),
        };
        let mut session = session;
        if spec.background {
            if let Ok(started) = wire::frame(torpor_api::guest::FrameType::Started, &pid.to_le_bytes()) {
                let _ = io::Write::write_all(&mut socket, &started);
            }
            let response = GuestResponse::Exited {
                pid,
                code: None,
                timed_out: false,
            };
            wire::finish(&mut socket, Ok(response));
            // The thread stays for the process, the connection must not.
            let _ = socket.shutdown(Shutdown::Both);
            drop(socket);
        } else if let Err(error) = session.begin_with(socket, spec.keep) {
            crate::log::line(
                crate::log::Level::Warning,
                format_args!("process {pid} has no client: {error}"),
            );
        }
        session.run();
    }

    fn begin(&self, spec: &ExecSpec) -> Result<(Session<'_>, u32), ExecError> {
        // A background process has nobody who waits for it, so it ends by itself or by a signal.
        let timeout_ms = spec.timeout_ms.filter(|ms| *ms > 0 && !spec.background);
        let deadline = timeout_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
        let command = command::prepare(spec, self.open_files)?;
        let (child, streams) = match spec.tty {
            Some(size) => start_under_terminal(self, &command, size)?,
            None => start_with_pipes(self, &command, spec.stdin)?,
        };
        let pid = child.pid();
        let entered = self.table.add(Arc::clone(&child), spec).map_err(|error| {
            let _ = self.children.signal(pid, nix::libc::SIGKILL);
            ExecError::os("enter a process")(error)
        })?;
        let wire_pid = entered.0.pid();
        Ok((
            Session::new(self, child, entered, streams, spec, deadline),
            wire_pid,
        ))
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

fn session_has_members(session: i32) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return false;
    };
    processes.flatten().any(|process| {
        let stat = std::fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        // "pid (name) state ppid pgrp session …", and a name may hold anything.
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        after_name.split(' ').nth(3).and_then(|id| id.parse().ok()) == Some(session)
    })
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
