//! The processes that execs started, and the only place that reaps.
//!
//! The main thread calls [`Children::reap`] whenever a child may have ended. Orphans that init inherits
//! are reaped and forgotten; a child that was started here gets its exit code stored and its event
//! raised. Forking happens under the same lock as reaping, so a child can't be reaped before it is
//! registered, and a PID is signalled only while it is not reaped yet and thus can't be anyone else's.

use crate::sys::process::{Reap, reap, signal_group};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Why a group was not signalled.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// Not running, or not started by an exec.
    #[error("no running process with PID {0} was started by an exec")]
    Unknown(i32),
    /// Out of range.
    #[error("{0} is no signal number")]
    NoSignal(i32),
    /// The kernel refused.
    #[error("cannot send signal {signal} to group {pid}")]
    Refused {
        /// Group.
        pid: i32,
        /// Signal.
        signal: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A process that an exec started.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    code: OnceLock<i32>,
    ended: EventFd,
}

impl Child {
    /// Its PID, which is its group and its session too.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Exit code or 128 + signal, once it ended.
    pub fn code(&self) -> Option<i32> {
        self.code.get().copied()
    }

    /// Readable as soon as it ended, and for ever after.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }
}

/// All running processes that execs started.
#[derive(Debug, Default)]
pub struct Children {
    running: Mutex<HashMap<i32, Arc<Child>>>,
}

impl Children {
    /// Start a child: `fork` returns the new PID.
    pub fn start(&self, fork: impl FnOnce() -> io::Result<i32>) -> io::Result<Arc<Child>> {
        let ended = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let mut running = self.lock();
        let pid = fork()?;
        let child = Arc::new(Child {
            pid,
            code: OnceLock::new(),
            ended,
        });
        running.insert(pid, Arc::clone(&child));
        Ok(child)
    }

    /// Reap everything that ended; tells whether any child is left.
    pub fn reap(&self) -> bool {
        let mut running = self.lock();
        loop {
            match reap() {
                Reap::AllRunning => return true,
                Reap::NoChildren => return false,
                Reap::Ended(reaped) => {
                    if let Some(child) = running.remove(&reaped.pid) {
                        let _ = child.code.set(reaped.code);
                        let _ = child.ended.write(1);
                    }
                }
            }
        }
    }

    /// Signal the whole group of a running child.
    pub fn signal(&self, pid: i32, signal: i32) -> Result<(), SignalError> {
        if !(1..=64).contains(&signal) {
            return Err(SignalError::NoSignal(signal));
        }
        let running = self.lock();
        if !running.contains_key(&pid) {
            return Err(SignalError::Unknown(pid));
        }
        signal_group(pid, signal).map_err(|source| SignalError::Refused { pid, signal, source })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Arc<Child>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
