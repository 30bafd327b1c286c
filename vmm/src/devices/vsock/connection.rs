//! One vsock connection: a client's unix stream on one side, a port of the guest on the other.
//!
//! Bytes to the client that its socket does not take at once are kept, at most [`BUF_ALLOC`]: that is the credit
//! the guest has. Bytes to the guest are never kept: they stay in the client's socket until the guest has
//! both credit and a buffer for them.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::sys::epoll::EpollFlags;
use torpor_api::vmm::GUEST_CID;

use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use crate::devices::queue::Buffers;
use crate::devices::sys;

/// Credit of the guest in bytes.
pub(crate) const BUF_ALLOC: u32 = 256 << 10;
/// After so many bytes the guest is told that they left.
const CREDIT_STEP: u32 = BUF_ALLOC / 4;
/// Credit of the guest's side until it has told its own: less than any guest gives by default, and room for a first request.
const EARLY_CREDIT: u32 = 4096;
/// Longest greeting: `CONNECT 4294967295\n` and some room.
const MAX_GREETING_BYTES: usize = 32;

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The client has not said where to.
    Greeting,
    /// Said; the guest can't be asked yet.
    Held,
    /// The guest was asked.
    Requested,
    /// The guest accepted.
    Established,
    /// The guest is done with it; the client still gets what the guest sent.
    Draining,
}

/// What the client's greeting came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// Not all of it yet.
    Partial,
    /// It wants this port.
    Port(u32),
    /// Nonsense, or gone.
    Bad,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    pub(crate) phase: Phase,
    pub(crate) host_port: u32,
    pub(crate) guest_port: u32,
    greeting: Vec<u8>,
    /// From the guest, not yet taken by the client.
    out: VecDeque<u8>,
    /// The client takes no more.
    pub(crate) out_closed: bool,
    /// The client sends no more.
    pub(crate) in_closed: bool,
    /// What the guest said it does no more: `SHUTDOWN_*`.
    guest_closed: u32,
    write_shut: bool,
    /// What the guest was told that we do no more.
    pub(crate) told_closed: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent: u32,
    forwarded: u32,
    told_forwarded: u32,
    /// The guest was asked for credit since it gave any.
    pub(crate) credit_asked: bool,
    /// In the list of those that have something for the guest.
    pub(crate) queued: bool,
    /// What epoll watches now.
    pub(crate) watched: Option<EpollFlags>,
}

impl Connection {
    /// A client that just connected.
    pub(crate) fn new(stream: UnixStream, host_port: u32) -> Self {
        Self {
            stream,
            phase: Phase::Greeting,
            host_port,
            guest_port: 0,
            greeting: Vec::new(),
            out: VecDeque::new(),
            out_closed: false,
            in_closed: false,
            guest_closed: 0,
            write_shut: false,
            told_closed: 0,
            peer_buf_alloc: EARLY_CREDIT,
            peer_fwd_cnt: 0,
            sent: 0,
            forwarded: 0,
            told_forwarded: 0,
            credit_asked: false,
            queued: false,
            watched: None,
        }
    }

    /// A packet of this connection to the guest.
    pub(crate) fn header(&mut self, op: u16, flags: u32) -> Header {
        self.told_forwarded = self.forwarded;
        Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len_bytes: 0,
            socket_type: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        }
    }

    /// Reads the greeting, and not one byte past its end.
    pub(crate) fn read_greeting(&mut self) -> Greeting {
        let mut byte = [0];
        while self.greeting.len() < MAX_GREETING_BYTES {
            match self.stream.read(&mut byte) {
                Ok(0) => return Greeting::Bad,
                Ok(_) if byte[0] == b'\n' => return self.parse_greeting(),
                Ok(_) => self.greeting.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Greeting::Partial,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Greeting::Bad,
            }
        }
        Greeting::Bad
    }

    fn parse_greeting(&self) -> Greeting {
        let port = std::str::from_utf8(&self.greeting)
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT "))
            .filter(|port| port.bytes().all(|digit| digit.is_ascii_digit()))
            .and_then(|port| port.parse().ok());
        port.map_or(Greeting::Bad, Greeting::Port)
    }

    /// Tells the client that it is through.
    pub(crate) fn accept(&mut self) -> io::Result<()> {
        self.phase = Phase::Established;
        self.stream
            .write_all(format!("OK {}\n", self.host_port).as_bytes())
    }

    /// Takes over the guest's view of its buffer.
    pub(crate) fn update_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// How many bytes the guest has room for.
    pub(crate) fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        usize::try_from(self.peer_buf_alloc.saturating_sub(in_flight)).unwrap_or(0)
    }

    /// Whether the client may be read for the guest: also before the guest has accepted, so that a first request is there
    /// when it does.
    pub(crate) fn may_read(&self) -> bool {
        matches!(self.phase, Phase::Requested | Phase::Established)
            && !self.in_closed
            && self.guest_closed & SHUTDOWN_RECEIVE == 0
    }

    /// Whether bytes of the client would be read if there were any, and are not going to be looked for anyway.
    fn wants_read(&self) -> bool {
        self.may_read() && !self.queued && self.credit() > 0
    }

    /// Reads the client's bytes into guest memory.
    pub(crate) fn read_into(&mut self, room: &Buffers<'_>) -> io::Result<usize> {
        let n_bytes = sys::readv(self.stream.as_fd(), room)?;
        self.sent = self.sent.wrapping_add(u32::try_from(n_bytes).unwrap_or(u32::MAX));
        Ok(n_bytes)
    }

    /// Takes the guest's bytes; false if it sent more than its credit or after its end.
    pub(crate) fn write_from(&mut self, mut payload: Buffers<'_>) -> bool {
        let len_bytes = payload.len();
        if self.guest_closed & SHUTDOWN_SEND != 0
            || self.out.len() + len_bytes > usize::try_from(BUF_ALLOC).unwrap_or(0)
        {
            return false;
        }
        if self.out_closed {
            self.forward(len_bytes);
            return true;
        }
        if self.out.is_empty() && len_bytes > 0 {
            match sys::send(self.stream.as_fd(), &payload) {
                Ok(n_bytes) => {
                    self.forward(n_bytes);
                    let _taken = payload.take_front(n_bytes);
                }
                Err(error) if is_transient(&error) => {}
                Err(_) => {
                    self.close_out();
                    self.forward(len_bytes);
                    return true;
                }
            }
        }
        let mut rest = vec![0; payload.len()];
        payload.copy_to(&mut rest);
        self.out.extend(rest);
        true
    }

    /// Gives the client what it takes now.
    pub(crate) fn flush(&mut self) {
        while !self.out.is_empty() {
            match self.stream.write(self.out.as_slices().0) {
                Ok(n_bytes) => {
                    self.out.drain(..n_bytes);
                    self.forward(n_bytes);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.close_out(),
            }
        }
        if self.guest_closed & SHUTDOWN_SEND != 0 && !self.write_shut && !self.out_closed {
            self.write_shut = true;
            // Fails if the client is gone, which reading from it will tell.
            let _gone = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// The client takes no more.
    pub(crate) fn close_out(&mut self) {
        self.out_closed = true;
        let n_bytes = self.out.len();
        self.out.clear();
        self.forward(n_bytes);
    }

    /// The guest's SHUTDOWN; true if it is done with the connection.
    pub(crate) fn guest_shutdown(&mut self, flags: u32) -> bool {
        self.guest_closed |= flags & SHUTDOWN_BOTH;
        self.guest_closed == SHUTDOWN_BOTH
    }

    /// Whether the guest may know of it.
    pub(crate) fn is_known(&self) -> bool {
        !matches!(self.phase, Phase::Greeting | Phase::Held)
    }

    /// Whether bytes wait for the client.
    pub(crate) fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// What must be said to the guest about ends that it was not told of.
    pub(crate) fn untold_closed(&self) -> u32 {
        let sends_no_more = if self.in_closed { SHUTDOWN_SEND } else { 0 };
        let receives_no_more = if self.out_closed { SHUTDOWN_RECEIVE } else { 0 };
        let closed = sends_no_more | receives_no_more;
        if closed & !self.told_closed != 0 {
            closed
        } else {
            0
        }
    }

    /// Whether the guest should hear that its bytes left.
    pub(crate) fn owes_credit_update(&self) -> bool {
        self.phase == Phase::Established && self.forwarded.wrapping_sub(self.told_forwarded) >= CREDIT_STEP
    }

    /// What epoll shall watch; `None` where only a hang-up could come, again and again.
    pub(crate) fn interest(&self) -> Option<EpollFlags> {
        match self.phase {
            Phase::Greeting => Some(EpollFlags::EPOLLIN),
            Phase::Held => Some(EpollFlags::EPOLLRDHUP),
            Phase::Requested if self.wants_read() => Some(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLIN),
            Phase::Requested => Some(EpollFlags::EPOLLRDHUP),
            Phase::Draining => Some(EpollFlags::EPOLLOUT),
            Phase::Established => {
                let mut flags = EpollFlags::empty();
                if self.has_output() {
                    flags |= EpollFlags::EPOLLOUT;
                }
                if self.wants_read() {
                    flags |= EpollFlags::EPOLLIN;
                }
                // Both its ends told apart only by a hang-up, which closes `out` and so comes once.
                let only_hang_up = !self.may_read() && !self.out_closed;
                (!flags.is_empty() || only_hang_up).then_some(flags)
            }
        }
    }

    fn forward(&mut self, n_bytes: usize) {
        self.forwarded = self
            .forwarded
            .wrapping_add(u32::try_from(n_bytes).unwrap_or(u32::MAX));
    }
}

/// Whether trying again later may help.
pub(crate) fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
