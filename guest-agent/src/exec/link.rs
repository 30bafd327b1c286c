//! The client's end of a session: frames in and out of a non-blocking socket, both sides bounded.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use torpor_api::guest::{FrameError, FrameType, HEADER_LEN, decode_header, encode_header};

const READ_BYTES: usize = 64 << 10;
/// Output is taken from the process only while less than this waits for the client.
const OUTBOX_BYTES: usize = 256 << 10;

/// What a read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// Perhaps bytes.
    Open,
    /// The client is gone.
    Closed,
}

/// A frame from the client.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// Type.
    pub kind: FrameType,
    /// Payload.
    pub payload: Vec<u8>,
}

/// A non-blocking socket with what was read but not handled, and what was produced but not sent.
#[derive(Debug)]
pub struct Link {
    socket: UnixStream,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
}

impl Link {
    /// Make the socket non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            inbox: Vec::new(),
            outbox: Vec::new(),
        })
    }

    /// For poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Read what is there, up to a bound.
    pub fn fill(&mut self) -> Filled {
        let mut chunk = [0; READ_BYTES];
        match self.socket.read(&mut chunk) {
            Ok(0) => Filled::Closed,
            Ok(n) => {
                self.inbox.extend_from_slice(chunk.get(..n).unwrap_or_default());
                Filled::Open
            }
            Err(error) if is_transient(&error) => Filled::Open,
            Err(_) => Filled::Closed,
        }
    }

    /// The next complete frame.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(header) = self.inbox.first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let (kind, len) = decode_header(*header)?;
        let end = HEADER_LEN + len;
        let Some(payload) = self.inbox.get(HEADER_LEN..end) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.inbox.drain(..end);
        Ok(Some(Frame { kind, payload }))
    }

    /// May more be queued?
    pub fn has_room(&self) -> bool {
        self.outbox.len() < OUTBOX_BYTES
    }

    /// Is something queued?
    pub fn has_output(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Queue a frame for the client.
    pub fn queue(&mut self, kind: FrameType, payload: &[u8]) -> Result<(), FrameError> {
        self.outbox
            .extend_from_slice(&encode_header(kind, payload.len())?);
        self.outbox.extend_from_slice(payload);
        Ok(())
    }

    /// Send what the socket takes now.
    pub fn flush(&mut self) -> Filled {
        while !self.outbox.is_empty() {
            match self.socket.write(&self.outbox) {
                Ok(n) => drop(self.outbox.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Filled::Closed,
            }
        }
        Filled::Open
    }

    /// Queue frames that are encoded already.
    pub fn queue_bytes(&mut self, frames: &[u8]) {
        self.outbox.extend_from_slice(frames);
    }

    /// How much is queued.
    pub fn queued_bytes(&self) -> usize {
        self.outbox.len()
    }

    /// Forget what was read and not handled.
    pub fn discard_input(&mut self) {
        self.inbox = Vec::new();
    }
}

/// Errors that mean "try again when poll says so".
pub fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
