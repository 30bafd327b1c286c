//! The listener: one thread that accepts, assembles request frames and has the quick ones answered.
//!
//! A resync after a wake touches the pages of this thread only: nothing is spawned, and nothing waits
//! for a slow peer, because request frames are read as they come. Slow requests get a thread from
//! [`crate::serve`]. A panic costs the connection, never the thread.

use crate::log::{self, Level};
use crate::serve::Server;
use crate::sys::listen::Listener;
use crate::wire;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};
use torpor_api::guest::{FrameType, GuestError, GuestErrorCode, HEADER_LEN, decode_header};

/// How long a peer may take to send its request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Most connections without a complete request; past it the oldest is closed.
const MAX_PENDING: usize = 256;
/// How long accepting rests after it failed, for example for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A request is read in steps of this size, so that a header that lies costs no memory.
const READ_BYTES: usize = 16 << 10;

/// Who connects to a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The host, who may ask for everything.
    Host,
    /// A process of the guest, whoever's it is.
    Inside,
}

/// A connection whose request is not complete.
struct Pending {
    origin: Origin,
    socket: UnixStream,
    bytes: Vec<u8>,
    deadline: Instant,
}

/// What has become of a pending connection.
enum Progress {
    Incomplete,
    Complete,
    Refused(GuestError),
    Gone,
}

/// Accepts for ever.
pub struct Front {
    listeners: Vec<(Listener, Origin)>,
    server: Arc<Server>,
    request_timeout: Duration,
    pending: Vec<Pending>,
    accept_after: Option<Instant>,
}

impl Front {
    /// Serve what connects to these listeners.
    pub fn new(listeners: Vec<(Listener, Origin)>, server: Arc<Server>) -> Self {
        Self {
            listeners,
            server,
            request_timeout: REQUEST_TIMEOUT,
            pending: Vec::new(),
            accept_after: None,
        }
    }

    /// Serve; returns never.
    pub fn run(mut self) -> ! {
        loop {
            self.step();
        }
    }

    fn step(&mut self) {
        let (accepts, ready) = self.wait();
        let mut ready = ready.into_iter();
        let pending = std::mem::take(&mut self.pending);
        for mut connection in pending {
            let progress = if ready.next().unwrap_or(false) {
                connection.read()
            } else if connection.deadline <= Instant::now() {
                Progress::Gone
            } else {
                Progress::Incomplete
            };
            match progress {
                Progress::Incomplete => self.pending.push(connection),
                Progress::Complete => self.hand_over(connection),
                Progress::Refused(error) => {
                    wire::finish(&mut connection.socket, Err(error));
                }
                Progress::Gone => {}
            }
        }
        for (index, accepts) in accepts.into_iter().enumerate() {
            if accepts {
                self.accept(index);
            }
        }
    }

    /// Wait for something to do: a connection to accept, and which of the pending ones to read.
    fn wait(&mut self) -> (Vec<bool>, Vec<bool>) {
        let now = Instant::now();
        self.accept_after = self.accept_after.filter(|after| *after > now);
        let next = self
            .pending
            .iter()
            .map(|pending| pending.deadline)
            .chain(self.accept_after)
            .min();
        let timeout = next.map_or(PollTimeout::NONE, |next| {
            let ms = next.saturating_duration_since(now).as_micros().div_ceil(1000);
            PollTimeout::from(u16::try_from(ms).unwrap_or(u16::MAX))
        });
        let accepting = if self.accept_after.is_some() {
            PollFlags::empty()
        } else {
            PollFlags::POLLIN
        };
        let listeners = self.listeners.iter();
        let mut fds: Vec<_> = listeners
            .map(|(listener, _)| PollFd::new(listener.as_fd(), accepting))
            .collect();
        fds.extend(
            self.pending
                .iter()
                .map(|p| PollFd::new(p.socket.as_fd(), PollFlags::POLLIN)),
        );
        let _ = poll(&mut fds, timeout);
        let ready = |fds: &[PollFd<'_>]| fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let (listening, pending) = fds.split_at(self.listeners.len());
        (ready(listening), ready(pending))
    }

    fn accept(&mut self, index: usize) {
        let Some((listener, origin)) = self.listeners.get(index) else {
            return;
        };
        let origin = *origin;
        match listener.accept() {
            Ok(socket) => {
                let mut connection = Pending::new(origin, socket, self.request_timeout);
                // The request is often there already.
                match connection.read() {
                    Progress::Complete => self.hand_over(connection),
                    Progress::Incomplete => self.pend(connection),
                    Progress::Refused(error) => wire::finish(&mut connection.socket, Err(error)),
                    Progress::Gone => {}
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                log::line(Level::Error, format_args!("cannot accept: {error}"));
                self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
            }
        }
    }

    fn hand_over(&mut self, connection: Pending) {
        let server = Arc::clone(&self.server);
        let origin = connection.origin;
        // A panic is logged by the hook; the peer sees its connection close.
        let served = catch_unwind(AssertUnwindSafe(move || {
            let payload = connection.bytes.get(HEADER_LEN..).unwrap_or_default();
            match origin {
                Origin::Host => server.serve(connection.socket, payload),
                Origin::Inside => {
                    server.serve_inside(connection.socket, payload);
                    None
                }
            }
        }));
        // To be closed by the peer, or to ask once more.
        if let Ok(Some(socket)) = served
            && socket.set_nonblocking(true).is_ok()
        {
            self.pend(Pending::new(origin, socket, self.request_timeout));
        }
    }

    fn pend(&mut self, connection: Pending) {
        if self.pending.len() >= MAX_PENDING {
            self.pending.remove(0);
        }
        self.pending.push(connection);
    }
}

impl Pending {
    fn new(origin: Origin, socket: UnixStream, request_timeout: Duration) -> Self {
        Self {
            origin,
            socket,
            bytes: Vec::new(),
            deadline: Instant::now() + request_timeout,
        }
    }

    /// Read what is there, never past the request frame: what follows belongs to the operation.
    fn read(&mut self) -> Progress {
        loop {
            let wanted = match self.missing_bytes() {
                Ok(0) => return Progress::Complete,
                Ok(wanted) => wanted.min(READ_BYTES),
                Err(error) => return Progress::Refused(error),
            };
            let mut chunk = [0; READ_BYTES];
            match self.socket.read(chunk.get_mut(..wanted).unwrap_or_default()) {
                Ok(0) => return Progress::Gone,
                Ok(n) => self.bytes.extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Incomplete,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Progress::Gone,
            }
        }
    }

    /// Bytes up to the end of the header or, once that is known, of the frame.
    fn missing_bytes(&self) -> Result<usize, GuestError> {
        let bad = |message: String| wire::error(GuestErrorCode::BadRequest, message);
        let Some(header) = self.bytes.first_chunk::<HEADER_LEN>() else {
            return Ok(HEADER_LEN - self.bytes.len());
        };
        let (kind, len) = decode_header(*header).map_err(|error| bad(error.to_string()))?;
        if kind != FrameType::Request {
            return Err(bad(format!(
                "a connection begins with a request, not with {kind:?}"
            )));
        }
        Ok((HEADER_LEN + len).saturating_sub(self.bytes.len()))
    }
}
