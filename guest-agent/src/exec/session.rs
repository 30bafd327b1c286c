//! A foreground process: one event loop over the client's socket, the process's streams and its end.
//!
//! Invariants: every buffer is bounded, in both directions, and a bound that is reached stops the
//! reading of what fills it, so that back-pressure goes from the process to the client and back. The
//! loop never blocks but in `poll`, so the time-out fires whatever client and process do. A client
//! that is gone (end of file counts) takes the whole group with it.
//!
//! Output after the end: what the process itself wrote is in its pipes when it ends. So they are read
//! to their end or, if something else keeps them open, for [`GRACE`] and then exactly as far as they
//! are filled at that moment.

use super::command::prepare;
use super::link::{Filled, Frame, Link, is_transient};
use super::streams::{Output, ProcessStreams, start_under_terminal, start_with_pipes};
use super::{ExecError, Execs};
use crate::children::Child;
use crate::sys::{bytes_readable, terminal};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use torpor_api::guest::{ExecSpec, FrameType, GuestResponse, WindowSize};

/// How long output is awaited after the process ended while something else holds its streams open.
const GRACE: Duration = Duration::from_millis(200);
/// Most bytes of one `Stdout` or `Stderr` frame.
const CHUNK_BYTES: usize = 32 << 10;
/// Frames are taken from the client only while less than this waits for the process.
const INPUT_BYTES: usize = 256 << 10;
/// The peer sends no more, even if what it sent is still to be read.
const PEER_CLOSED: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);
/// End of transmission, which is how a terminal says end of file.
const END_OF_TRANSMISSION: u8 = 4;

/// Run a process to its end. `None`: the client is gone.
pub fn run(
    execs: &Execs,
    socket: &mut UnixStream,
    spec: &ExecSpec,
) -> Result<Option<GuestResponse>, ExecError> {
    let deadline = spec
        .timeout_ms
        .and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
    let command = prepare(spec, execs.open_files)?;
    let (child, streams) = match spec.tty {
        Some(size) => start_under_terminal(execs, &command, size)?,
        None => start_with_pipes(execs, &command, spec.stdin)?,
    };
    let link = Link::new(socket).map_err(ExecError::os("make the connection non-blocking"));
    let mut session = match link {
        Ok(link) => Session::new(execs, child, link, streams, spec, deadline),
        Err(error) => {
            let _ = execs.children.signal(child.pid(), libc::SIGKILL);
            return Err(error);
        }
    };
    let end = session.run();
    let rest = session.close(end.is_err() || matches!(end, Ok(None)));
    // The answer is small and the client is expected to read it; the socket's time-out is the bound.
    socket
        .set_nonblocking(false)
        .map_err(ExecError::os("make the connection blocking"))?;
    if socket.write_all(&rest).is_err() {
        return Ok(None);
    }
    end
}

/// What poll watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Client,
    End,
    Input,
    Output(usize),
}

struct Session<'a> {
    execs: &'a Execs,
    child: Arc<Child>,
    link: Link<'a>,
    streams: ProcessStreams,
    takes_input: bool,
    input: Vec<u8>,
    input_ended: bool,
    deadline: Option<Instant>,
    timed_out: bool,
    grace_end: Option<Instant>,
}

impl<'a> Session<'a> {
    fn new(
        execs: &'a Execs,
        child: Arc<Child>,
        link: Link<'a>,
        streams: ProcessStreams,
        spec: &ExecSpec,
        deadline: Option<Instant>,
    ) -> Self {
        Self {
            execs,
            child,
            link,
            streams,
            takes_input: spec.stdin,
            input: Vec::new(),
            input_ended: false,
            deadline,
            timed_out: false,
            grace_end: None,
        }
    }

    fn run(&mut self) -> Result<Option<GuestResponse>, ExecError> {
        let pid = u32::try_from(self.child.pid()).unwrap_or(0);
        self.queue(FrameType::Started, &pid.to_le_bytes())?;
        loop {
            if let Some(code) = self.child.code()
                && self.streams.outputs.is_empty()
            {
                return Ok(Some(GuestResponse::Exited {
                    pid,
                    code: Some(code),
                    timed_out: self.timed_out,
                }));
            }
            for (source, events) in self.wait()? {
                match source {
                    Source::Client if self.serve_client(events)? == Filled::Closed => return Ok(None),
                    Source::Client => {}
                    Source::End => self.grace_end = Some(Instant::now() + GRACE),
                    Source::Input => self.feed_process(),
                    Source::Output(index) => self.forward_output(index)?,
                }
            }
            self.handle_frames()?;
            self.watch_clock();
        }
    }

    /// End the session; the group too, if nobody waits for it. Returns what was not sent yet.
    fn close(self, kill: bool) -> Vec<u8> {
        if kill {
            // Already gone is as good as killed.
            let _ = self.execs.children.signal(self.child.pid(), libc::SIGKILL);
        }
        self.link.into_unsent()
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
        // Highest index first, so that taking an output out leaves the others where they are.
        Ok(ready.rev().collect())
    }

    /// A source that is not wanted now is left out: its hang-up would make poll return for ever.
    fn watched(&self) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let mut client = PEER_CLOSED;
        client.set(PollFlags::POLLIN, self.input.len() < INPUT_BYTES);
        client.set(PollFlags::POLLOUT, self.link.has_output());
        let mut watched = vec![(Source::Client, self.link.fd(), client)];
        if self.grace_end.is_none() {
            watched.push((Source::End, self.child.ended(), PollFlags::POLLIN));
        }
        if let Some(input) = &self.streams.input
            && !self.input.is_empty()
        {
            watched.push((Source::Input, input.as_fd(), PollFlags::POLLOUT));
        }
        if self.link.has_room() {
            let outputs = self.streams.outputs.iter().enumerate();
            watched.extend(outputs.map(|(i, out)| (Source::Output(i), out.file.as_fd(), PollFlags::POLLIN)));
        }
        watched
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
        let Some(next) = [running_deadline, grace].into_iter().flatten().min() else {
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
            self.timed_out = self
                .execs
                .children
                .signal(self.child.pid(), libc::SIGKILL)
                .is_ok();
            self.deadline = self.deadline.filter(|_| self.timed_out);
        }
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

    fn serve_client(&mut self, events: PollFlags) -> Result<Filled, ExecError> {
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PEER_CLOSED;
        if events.intersects(gone) {
            return Ok(Filled::Closed);
        }
        if events.contains(PollFlags::POLLIN) && self.link.fill() == Filled::Closed {
            return Ok(Filled::Closed);
        }
        Ok(if events.contains(PollFlags::POLLOUT) {
            self.link.flush()
        } else {
            Filled::Open
        })
    }

    fn handle_frames(&mut self) -> Result<(), ExecError> {
        while self.input.len() < INPUT_BYTES {
            let frame = self
                .link
                .next_frame()
                .map_err(|error| ExecError::Protocol(error.to_string()))?;
            let Some(frame) = frame else { break };
            self.handle_frame(&frame)?;
        }
        self.end_input_if_done();
        Ok(())
    }

    fn handle_frame(&mut self, frame: &Frame) -> Result<(), ExecError> {
        let bad = |message: &str| ExecError::Protocol(message.to_owned());
        match frame.kind {
            FrameType::Stdin if !self.takes_input => Err(bad("this exec takes no standard input")),
            FrameType::Stdin if self.input_ended => Err(bad("standard input after its end")),
            FrameType::Stdin => {
                if self.streams.input.is_some() {
                    self.input.extend_from_slice(&frame.payload);
                }
                Ok(())
            }
            FrameType::StdinEof => {
                if !self.input_ended && self.takes_input && self.streams.controller.is_some() {
                    self.input.push(END_OF_TRANSMISSION);
                }
                self.input_ended = true;
                Ok(())
            }
            FrameType::Resize => {
                let size = serde_json::from_slice::<WindowSize>(&frame.payload);
                let size = size.map_err(|error| bad(&format!("no window size: {error}")))?;
                let controller = self.streams.controller.as_ref();
                let controller = controller.ok_or_else(|| bad("this exec has no terminal"))?;
                terminal::resize(controller, size).map_err(ExecError::os("resize a terminal"))
            }
            FrameType::Signal => self.signal(&frame.payload),
            other => Err(bad(&format!("{other:?} is no frame of an exec's client"))),
        }
    }

    fn signal(&self, payload: &[u8]) -> Result<(), ExecError> {
        use crate::children::SignalError;
        let number = <[u8; 4]>::try_from(payload).map(u32::from_le_bytes).ok();
        let number = number.and_then(|number| i32::try_from(number).ok());
        let number = number.ok_or_else(|| ExecError::Protocol("a signal is four bytes".to_owned()))?;
        match self.execs.children.signal(self.child.pid(), number) {
            // Too late is not wrong: the client could not know.
            Ok(()) | Err(SignalError::Unknown(_) | SignalError::Refused { .. }) => Ok(()),
            Err(error @ SignalError::NoSignal(_)) => Err(ExecError::Protocol(error.to_string())),
        }
    }

    fn feed_process(&mut self) {
        let Some(mut input) = self.streams.input.as_ref() else {
            return;
        };
        match input.write(&self.input) {
            Ok(n) => drop(self.input.drain(..n)),
            Err(error) if is_transient(&error) => {}
            Err(_) => {
                // The process closed its end: it wants no more, which is no error.
                self.input.clear();
                self.streams.input = None;
            }
        }
    }

    fn end_input_if_done(&mut self) {
        if self.input_ended && self.input.is_empty() && self.streams.controller.is_none() {
            self.streams.input = None;
        }
    }

    fn forward_output(&mut self, index: usize) -> Result<(), ExecError> {
        let Some(output) = self.streams.outputs.get_mut(index) else {
            return Ok(());
        };
        let mut chunk = [0; CHUNK_BYTES];
        let limit = output.owed_bytes.unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        let kind = output.kind;
        match output.file.read(chunk.get_mut(..limit).unwrap_or_default()) {
            Err(error) if is_transient(&error) => return Ok(()),
            // A terminal whose processes are gone answers EIO.
            Ok(0) | Err(_) => drop(self.streams.outputs.remove(index)),
            Ok(n) => {
                output.owed_bytes = output.owed_bytes.map(|owed| owed.saturating_sub(n));
                self.queue(kind, chunk.get(..n).unwrap_or_default())?;
            }
        }
        self.release_paid_outputs();
        Ok(())
    }

    fn queue(&mut self, kind: FrameType, payload: &[u8]) -> Result<(), ExecError> {
        self.link
            .queue(kind, payload)
            .map_err(|error| ExecError::Protocol(error.to_string()))?;
        // Sent at once if it can be: a prompt must not wait for the next event. A dead client shows
        // in the next poll.
        self.link.flush();
        Ok(())
    }
}
