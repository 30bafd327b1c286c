//! One process from its start to its end: an event loop over its clients' sockets, its streams and its end.
//!
//! Output goes into the process's kept output and from there to every client, each at its own place. Invariants:
//! every buffer is bounded, in both directions, and a bound that is reached stops the reading of what fills it, so
//! that back-pressure goes from the process to the slowest client and back. The loop never blocks but in `poll`,
//! so the time-out fires whatever client and process do. An owner that is gone (end of file counts) takes the
//! whole group with it; any other client is expected back for [`RETURN_PATIENCE`], in which no output is dropped
//! that it has not got, and then the process runs on unattended.
//!
//! Output after the end: what the process itself wrote is in its pipes when it ends. So they are read
//! to their end or, if something else keeps them open, for [`GRACE`] and then exactly as far as they
//! are filled at that moment.

mod clients;
mod input;

use super::client::Client;
use super::kept_output::KEPT_BYTES;
use super::link::is_transient;
use super::streams::{Output, ProcessStreams};
use super::table::Process;
use super::{ExecError, Execs};
use crate::children::Child;
use crate::errors::Failed;
use crate::sys::bytes_readable;
use crate::wire;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use torpor_api::guest::{ExecSpec, GuestResponse};

/// How long output is awaited after the process ended while something else holds its streams open.
const GRACE: Duration = Duration::from_millis(200);
/// How long a client that is gone is expected back.
const RETURN_PATIENCE: Duration = Duration::from_secs(60);
/// How long a client of an ended process may take nothing of what is left for it.
const STALL_PATIENCE: Duration = Duration::from_secs(60);
/// Most bytes read from the process at once.
const CHUNK_BYTES: usize = 32 << 10;
/// Output is read only while the slowest client lacks less than this. As much again is kept before it, because
/// what is on its way when a connection breaks is lost, and has to be sent again.
const BACKLOG_BYTES: u64 = (KEPT_BYTES / 2) as u64;
/// The peer sends no more, even if what it sent is still to be read.
const PEER_CLOSED: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);

/// What poll watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Arrival,
    Client(usize),
    End,
    Input,
    Output(usize),
}

/// A client that is gone and may come back.
#[derive(Debug, Clone, Copy)]
struct Expected {
    cursor: u64,
    until: Instant,
}

/// The loop's own state.
pub struct Session<'a> {
    execs: &'a Execs,
    process: Arc<Process>,
    child: Arc<Child>,
    arrived: Arc<EventFd>,
    streams: ProcessStreams,
    clients: Vec<Client>,
    expected: Option<Expected>,
    takes_input: bool,
    input: Vec<u8>,
    input_ended: bool,
    deadline: Option<Instant>,
    timed_out: bool,
    grace_end: Option<Instant>,
}

impl<'a> Session<'a> {
    /// The session of a process that was just started.
    pub fn new(
        execs: &'a Execs,
        child: Arc<Child>,
        (process, arrived): (Arc<Process>, Arc<EventFd>),
        streams: ProcessStreams,
        spec: &ExecSpec,
        deadline: Option<Instant>,
    ) -> Self {
        Self {
            execs,
            process,
            child,
            arrived,
            streams,
            clients: Vec::new(),
            expected: None,
            takes_input: spec.stdin,
            input: Vec::new(),
            input_ended: false,
            deadline,
            timed_out: false,
            grace_end: None,
        }
    }

    /// Run until the process has ended and everybody has heard of it.
    pub fn run(mut self) {
        if let Err(error) = self.follow() {
            self.kill();
            let last = wire::outcome(Err(Failed::from(error).0));
            self.answer_all(&last);
        }
        let mut state = self.process.state();
        state.end();
        state.output.shrink();
    }

    fn follow(&mut self) -> Result<(), ExecError> {
        loop {
            self.admit_arrivals();
            self.serve_clients();
            if self.is_drained() && self.clients.is_empty() && self.process.end_unless_joined() {
                return Ok(());
            }
            for (source, events) in self.wait()? {
                match source {
                    // Taken in at the head of the loop.
                    Source::Arrival => {}
                    Source::Client(index) => self.hear_client(index, events),
                    Source::End => self.grace_end = Some(Instant::now() + GRACE),
                    Source::Input => self.feed_process(),
                    Source::Output(index) => self.take_output(index),
                }
            }
            self.watch_clock();
        }
    }

    /// The process ended, and all that it wrote is kept.
    fn is_drained(&self) -> bool {
        self.child.code().is_some() && self.streams.outputs.is_empty()
    }

    fn response(&self) -> GuestResponse {
        GuestResponse::Exited {
            pid: self.process.pid(),
            code: self.child.code(),
            timed_out: self.timed_out,
        }
    }

    fn kill(&self) {
        // Already gone is as good as killed.
        let _ = self.execs.children.signal(self.child.pid(), libc::SIGKILL);
    }

    fn wait(&self) -> Result<Vec<(Source, PollFlags)>, ExecError> {
        let watched = self.watched();
        let mut fds: Vec<_> = watched
            .iter()
            .map(|(_, fd, events)| PollFd::new(*fd, *events))
            .collect();
        match poll(&mut fds, self.poll_timeout()) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(ExecError::os("wait for a process")(errno.into())),
        }
        let ready = watched.iter().zip(&fds).filter_map(|((source, ..), fd)| {
            // nix knows no name for POLLRDHUP and then says nothing at all.
            let events = fd.revents().unwrap_or(PEER_CLOSED);
            (!events.is_empty()).then_some((*source, events))
        });
        // Highest index first, so that taking one out leaves the others where they are.
        Ok(ready.rev().collect())
    }

    /// A source that is not wanted now is left out: its hang-up would make poll return for ever.
    fn watched(&self) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let mut watched = vec![(Source::Arrival, self.arrived.as_fd(), PollFlags::POLLIN)];
        for (index, client) in self.clients.iter().enumerate() {
            let mut events = PEER_CLOSED;
            events.set(PollFlags::POLLIN, self.wants_input() && !client.is_answered);
            events.set(PollFlags::POLLOUT, client.link.has_output());
            watched.push((Source::Client(index), client.link.fd(), events));
        }
        if self.grace_end.is_none() {
            watched.push((Source::End, self.child.ended(), PollFlags::POLLIN));
        }
        if let Some(input) = &self.streams.input
            && !self.input.is_empty()
        {
            watched.push((Source::Input, input.as_fd(), PollFlags::POLLOUT));
        }
        if self.has_room() {
            let outputs = self.streams.outputs.iter().enumerate();
            watched.extend(outputs.map(|(i, out)| (Source::Output(i), out.file.as_fd(), PollFlags::POLLIN)));
        }
        watched
    }

    /// May more be read from the process?
    fn has_room(&self) -> bool {
        let expected = self.expected.map(|expected| expected.cursor);
        let slowest = self
            .clients
            .iter()
            .map(|client| client.cursor)
            .chain(expected)
            .min();
        let end = self.process.state().output.end();
        slowest.is_none_or(|cursor| end.saturating_sub(cursor) < BACKLOG_BYTES)
    }

    fn poll_timeout(&self) -> PollTimeout {
        let running_deadline = self
            .deadline
            .filter(|_| !self.timed_out && self.grace_end.is_none());
        // Once a debt is set it is readable at once, so only the moment of setting it is awaited.
        let is_owed = self
            .streams
            .outputs
            .iter()
            .all(|output| output.owed_bytes.is_some());
        let grace = self.grace_end.filter(|_| !is_owed);
        let return_patience = self
            .expected
            .map(|expected| expected.until)
            .filter(|_| !self.has_room());
        let stalled = self
            .clients
            .iter()
            .filter(|client| client.is_answered)
            .map(|client| client.moved + STALL_PATIENCE)
            .min();
        let moments = [running_deadline, grace, return_patience, stalled];
        let Some(next) = moments.into_iter().flatten().min() else {
            return PollTimeout::NONE;
        };
        // Rounded up: a poll that ends before the moment would spin until it.
        let ms = next
            .saturating_duration_since(Instant::now())
            .as_micros()
            .div_ceil(1000);
        PollTimeout::from(u16::try_from(ms).unwrap_or(u16::MAX))
    }

    fn watch_clock(&mut self) {
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| deadline <= now)
            && !self.timed_out
            && self.child.code().is_none()
        {
            // Refused only if the process ended in this instant; then it was in time.
            let pid = self.child.pid();
            self.timed_out = self.execs.children.signal(pid, libc::SIGKILL).is_ok();
            self.process.state().timed_out = self.timed_out;
            self.deadline = self.deadline.filter(|_| self.timed_out);
        }
        self.expected = self.expected.filter(|expected| expected.until > now);
        self.clients
            .retain(|client| !client.is_answered || client.moved + STALL_PATIENCE > now);
        if self.grace_end.is_some_and(|end| end <= now) {
            for output in self
                .streams
                .outputs
                .iter_mut()
                .filter(|output| output.owed_bytes.is_none())
            {
                output.owed_bytes = Some(bytes_readable(&output.file).unwrap_or(0));
            }
            self.release_paid_outputs();
        }
    }

    /// Pipes that others still write to go on being emptied elsewhere: closing them would kill a
    /// server that was started with `&`.
    fn release_paid_outputs(&mut self) {
        let outputs = std::mem::take(&mut self.streams.outputs);
        let (paid, open) = outputs
            .into_iter()
            .partition(|output| output.owed_bytes == Some(0));
        self.streams.outputs = open;
        let paid: Vec<Output> = paid;
        if self.streams.controller.is_none() {
            self.execs
                .orphaned_output
                .adopt(paid.into_iter().map(|output| output.file));
        }
    }

    fn take_output(&mut self, index: usize) {
        let Some(output) = self.streams.outputs.get_mut(index) else {
            return;
        };
        let mut chunk = [0; CHUNK_BYTES];
        let limit = output.owed_bytes.unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let kind = output.kind;
        match output.file.read(chunk.get_mut(..limit).unwrap_or_default()) {
            Err(error) if is_transient(&error) => return,
            // A terminal whose processes are gone answers EIO.
            Ok(0) | Err(_) => drop(self.streams.outputs.remove(index)),
            Ok(n) => {
                output.owed_bytes = output.owed_bytes.map(|owed| owed.saturating_sub(n));
                let read = chunk.get(..n).unwrap_or_default();
                self.process.state().output.push(kind, read);
            }
        }
        self.release_paid_outputs();
    }
}
