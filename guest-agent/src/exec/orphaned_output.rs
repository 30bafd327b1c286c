//! Pipes that outlive their exec: read and thrown away, so that a process that was started with `&`
//! and still writes is neither blocked nor killed by SIGPIPE.
//!
//! One thread, started with the first such pipe, polls them all and an event by which new ones
//! are announced; it ends with the agent.

use crate::log::{self, Level};
use crate::threads;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Most pipes kept; past it the oldest is closed.
const MAX_PIPES: usize = 512;

/// Hands pipes to the thread.
#[derive(Debug, Default)]
pub struct OrphanedOutput(Mutex<Option<Arc<Arrivals>>>);

#[derive(Debug)]
struct Arrivals {
    files: Mutex<Vec<File>>,
    arrived: EventFd,
}

impl OrphanedOutput {
    /// Empty these non-blocking pipes until nobody writes to them any more.
    pub fn adopt(&self, files: impl Iterator<Item = File>) {
        let mut files = files.peekable();
        if files.peek().is_none() {
            return;
        }
        let mut started = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if started.is_none() {
            *started = start();
        }
        // Without a thread the pipes close here, as they would without this module.
        if let Some(arrivals) = started.as_ref() {
            arrivals
                .files
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(files);
            let _ = arrivals.arrived.write(1);
        }
    }
}

fn start() -> Option<Arc<Arrivals>> {
    let arrived = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).ok()?;
    let arrivals = Arc::new(Arrivals {
        files: Mutex::default(),
        arrived,
    });
    let shared = Arc::clone(&arrivals);
    match threads::start("orphaned-output", move || discard(&shared)) {
        Ok(()) => Some(arrivals),
        Err(error) => {
            log::line(
                Level::Warning,
                format_args!("cannot keep orphaned output: {error}"),
            );
            None
        }
    }
}

fn discard(arrivals: &Arrivals) {
    let mut pipes: Vec<File> = Vec::new();
    let mut scratch = [0; 16 << 10];
    loop {
        pipes.append(&mut arrivals.files.lock().unwrap_or_else(PoisonError::into_inner));
        pipes.drain(..pipes.len().saturating_sub(MAX_PIPES));
        let fds = pipes.iter().map(AsFd::as_fd).chain([arrivals.arrived.as_fd()]);
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let _ = poll(&mut fds, PollTimeout::NONE);
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let _ = arrivals.arrived.read();
        let mut ready = ready.into_iter();
        pipes.retain(|mut pipe| {
            !ready.next().unwrap_or(false)
                || match pipe.read(&mut scratch) {
                    Ok(n) => n > 0,
                    Err(error) => super::link::is_transient(&error),
                }
        });
    }
}
