//! The processes that execs started: those that run, and the last ones that ended, with the end of their output.
//!
//! A process is known by its PID and, because PIDs come again, by a serial. Its session's thread fills in what
//! happens; anybody may read, and may hand a client's socket to the session. Ended processes are forgotten, oldest
//! first, beyond [`KEPT_ENDED`] of them or [`KEPT_ENDED_BYTES`] of output. Of those that nobody started in the background
//! the last ones keep their output whole, because a client that a pause cut off comes back for it.

use super::kept_output::KeptOutput;
use crate::children::Child;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use torpor_api::guest::{AttachSpec, ExecSpec, ProcessEntry, WindowSize};

const KEPT_ENDED: usize = 128;
const KEPT_ENDED_BYTES: usize = 8 << 20;
/// Ended processes whose output stays whole though nobody started them in the background.
const KEPT_WHOLE: usize = 4;
/// Bytes of output that are kept of the others.
const KEPT_OF_OLD: usize = 64 << 10;
/// Most bytes of a command line that are kept.
const KEPT_ARGV_BYTES: usize = 4096;

/// Somebody who wants something of a session.
#[derive(Debug)]
pub struct Arrival {
    /// Its connection.
    pub socket: UnixStream,
    /// What it wants.
    pub wish: Wish,
}

/// What is wanted of a session.
#[derive(Debug)]
pub enum Wish {
    /// Join it.
    Join(AttachSpec),
    /// Add this to its input.
    Input(Vec<u8>),
    /// End its input.
    InputEnd,
    /// Give its terminal another size.
    Resize(WindowSize),
}

/// What changes of a process.
#[derive(Debug, Default)]
pub struct State {
    /// The end of its output.
    pub output: KeptOutput,
    /// Bytes of standard input that were taken from clients, and whether the end was.
    pub input: (u64, bool),
    /// Size of its terminal.
    pub tty: Option<WindowSize>,
    /// It was killed because its time was up.
    pub timed_out: bool,
    live: Option<Live>,
    exit_code: Option<i32>,
}

/// What a process needs only while it has a session; descriptors, so an ended one must not keep it.
#[derive(Debug)]
struct Live {
    child: Arc<Child>,
    arrivals: Vec<Arrival>,
    arrived: Arc<EventFd>,
}

impl State {
    /// The session is over: nothing changes any more, and nobody takes arrivals.
    pub fn is_over(&self) -> bool {
        self.live.is_none()
    }

    /// Exit code or 128 + signal, once the process ended.
    pub fn exit_code(&self) -> Option<i32> {
        let live = self.live.as_ref().and_then(|live| live.child.code());
        live.or(self.exit_code)
    }

    /// The session is over.
    pub fn end(&mut self) {
        self.exit_code = self.exit_code();
        self.live = None;
    }
}

/// A process that an exec started.
#[derive(Debug)]
pub struct Process {
    /// Tells processes apart that had the same PID.
    pub serial: u64,
    pid: u32,
    argv: Vec<String>,
    started_unix_ms: u64,
    background: bool,
    state: Mutex<State>,
}

impl Process {
    /// PID as it goes over the wire.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What changes.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hand somebody over to the session; gives him back if that is over.
    pub fn hand_over(&self, arrival: Arrival) -> Result<(), Arrival> {
        let mut state = self.state();
        let Some(live) = state.live.as_mut() else {
            return Err(arrival);
        };
        live.arrivals.push(arrival);
        let _ = live.arrived.write(1);
        Ok(())
    }

    /// Put back who has to wait.
    pub fn put_back(&self, waiting: Vec<Arrival>) {
        if let Some(live) = self.state().live.as_mut() {
            live.arrivals.splice(..0, waiting);
        }
    }

    /// Whoever wants something.
    pub fn take_arrivals(&self) -> Vec<Arrival> {
        let mut state = self.state();
        let Some(live) = state.live.as_mut() else {
            return Vec::new();
        };
        let _ = live.arrived.read();
        std::mem::take(&mut live.arrivals)
    }

    /// End the session, unless somebody wants to join it in this instant.
    pub fn end_unless_joined(&self) -> bool {
        let mut state = self.state();
        if state.live.as_ref().is_some_and(|live| !live.arrivals.is_empty()) {
            return false;
        }
        state.end();
        true
    }

    fn entry(&self) -> ProcessEntry {
        let state = self.state();
        let exit_code = state.exit_code();
        ProcessEntry {
            pid: self.pid(),
            serial: self.serial,
            argv: self.argv.clone(),
            started_unix_ms: self.started_unix_ms,
            running: exit_code.is_none(),
            exit_code,
            timed_out: state.timed_out,
            tty: state.tty,
            background: self.background,
            output: (state.output.begin(), state.output.end()),
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Table(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    processes: Vec<Arc<Process>>,
    next_serial: u64,
}

impl Table {
    /// Enter a process that was just started.
    /// The event is raised when somebody wants to join.
    pub fn add(&self, child: Arc<Child>, spec: &ExecSpec) -> io::Result<(Arc<Process>, Arc<EventFd>)> {
        let arrived = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let arrived = Arc::new(arrived);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut inner = self.lock();
        inner.next_serial += 1;
        let process = Arc::new(Process {
            serial: inner.next_serial,
            pid: u32::try_from(child.pid()).unwrap_or(0),
            argv: shortened(&spec.argv),
            started_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            background: spec.background,
            state: Mutex::new(State {
                tty: spec.tty,
                live: Some(Live {
                    child,
                    arrivals: Vec::new(),
                    arrived: Arc::clone(&arrived),
                }),
                ..State::default()
            }),
        });
        inner.processes.push(Arc::clone(&process));
        inner.forget_old();
        Ok((process, arrived))
    }

    /// The process that has this PID, or had it last.
    pub fn find(&self, pid: u32, serial: Option<u64>) -> Option<Arc<Process>> {
        let inner = self.lock();
        let mut newest_first = inner.processes.iter().rev();
        newest_first
            .find(|process| process.pid() == pid && serial.is_none_or(|serial| process.serial == serial))
            .cloned()
    }

    /// What is known of them, oldest first.
    pub fn entries(&self) -> Vec<ProcessEntry> {
        self.lock()
            .processes
            .iter()
            .map(|process| process.entry())
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn forget_old(&mut self) {
        let (mut count, mut bytes, mut n_whole) = (0, 0, 0);
        let mut kept: Vec<_> = self.processes.drain(..).rev().collect();
        kept.retain(|process| {
            let mut state = process.state();
            if !state.is_over() {
                return true;
            }
            if !process.background {
                n_whole += 1;
                if n_whole > KEPT_WHOLE {
                    state.output.trim(KEPT_OF_OLD);
                    state.output.shrink();
                }
            }
            count += 1;
            bytes += state.output.size();
            count <= KEPT_ENDED && bytes <= KEPT_ENDED_BYTES
        });
        kept.reverse();
        self.processes = kept;
    }
}

fn shortened(argv: &[String]) -> Vec<String> {
    let mut left = KEPT_ARGV_BYTES;
    let mut kept = Vec::new();
    for arg in argv {
        let end = arg.floor_char_boundary(left.min(arg.len()));
        kept.push(arg.get(..end).unwrap_or_default().to_owned());
        left -= end;
        if left == 0 {
            break;
        }
    }
    kept
}
