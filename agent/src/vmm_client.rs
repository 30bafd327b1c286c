//! Client of the control protocol: the only place that talks to a `torpor-vmm` process.
//!
//! One task per [`connection`] reads datagrams and hands each reply to the request that waits for it; events go
//! to one bounded queue. Requests are written by the caller itself, because a `SOCK_SEQPACKET` datagram is
//! atomic. End of file means that the VMM is gone: every waiting request fails with
//! [`VmmClientError::Gone`], and the event queue ends. A VMM is not trusted, since a guest may have taken it
//! over: a datagram that is no message and a flood of events end the connection; a reply to nobody is dropped.
//!
//! Not its job: deciding what to ask, and starting or reaping processes.

mod connection;
mod error;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use tokio::sync::mpsc;
use torpor_api::vmm::{Counters, Event, FdRole, PersistStats, Reply, Request, RestoreTrace, Shape, VmmState};

use connection::Connection;
pub use error::VmmClientError;

/// Longest wait for any reply. A VMM that is silent for longer is as good as gone.
pub const REPLY_DEADLINE: Duration = Duration::from_secs(60);

/// What a status request answers.
#[derive(Debug, Clone, PartialEq)]
pub struct VmmStatus {
    /// Where the VMM stands.
    pub state: VmmState,
    /// What it was built as.
    pub shape: Option<Shape>,
    /// Its version.
    pub version: String,
    /// The last persist of this process.
    pub persisted: Option<PersistStats>,
    /// Counters of this execution.
    pub counters: Counters,
}

/// What a run from frozen answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunReport {
    /// A persist was under way and was ended.
    pub persist_cancelled: bool,
    /// From the request to the vCPUs released, in microseconds.
    pub run_us: u64,
}

/// Descriptors that travel with a request, by role. Their owners keep them.
pub type Fds<'a> = [(FdRole, &'a OwnedFd)];

/// A connection to one VMM. Dropping the last clone ends it and changes nothing for the guest.
#[derive(Clone)]
pub struct VmmClient(Connection);

/// What one VMM reports by itself; ends with the connection.
pub struct VmmEvents(mpsc::Receiver<Event>);

impl VmmEvents {
    /// The next event, or `None` once the VMM is gone.
    pub async fn next(&mut self) -> Option<Event> {
        self.0.recv().await
    }
}

impl VmmClient {
    /// Connect to the VMM whose control socket is at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<(Self, VmmEvents), VmmClientError> {
        let socket = torpor_ipc::connect_to(path).map_err(|source| VmmClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::from_socket(socket)
    }

    /// Speak over a connected, non-blocking socket.
    ///
    /// # Errors
    /// The event loop takes no more descriptors.
    pub fn from_socket(socket: OwnedFd) -> Result<(Self, VmmEvents), VmmClientError> {
        let (connection, events) = Connection::open(socket)?;
        Ok((Self(connection), VmmEvents(events)))
    }

    /// Wait until the connection has ended.
    pub async fn closed(&self) {
        self.0.closed().cancelled().await;
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.closed().is_cancelled()
    }

    /// Build everything that needs no memory.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn prepare(&self, shape: Shape) -> Result<(), VmmClientError> {
        self.done(Request::Prepare { shape }, &[]).await
    }

    /// Boot from kernel and disk.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn boot(
        &self,
        cmdline: String,
        console_limit: u64,
        fds: &Fds<'_>,
    ) -> Result<(), VmmClientError> {
        let request = Request::Boot {
            cmdline,
            console_limit,
        };
        self.done(request, fds).await
    }

    /// Run from an image; `request` is a [`Request::Restore`].
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn restore(&self, request: Request, fds: &Fds<'_>) -> Result<RestoreTrace, VmmClientError> {
        match self.0.request(request, fds).await? {
            Reply::Restored { trace } => Ok(trace),
            other => Err(unexpected("restore", &other)),
        }
    }

    /// Stop the vCPUs; answers how long that took in microseconds.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn freeze(&self) -> Result<u64, VmmClientError> {
        match self.0.request(Request::Freeze, &[]).await? {
            Reply::Frozen { freeze_us } => Ok(freeze_us),
            other => Err(unexpected("freeze", &other)),
        }
    }

    /// Begin to write the image; the end is an event.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn persist(&self, generation: u64, image: &Fds<'_>) -> Result<(), VmmClientError> {
        self.done(Request::Persist { generation }, image).await
    }

    /// Begin to write what the running guest has changed to the image.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn pre_copy(&self, image: &Fds<'_>) -> Result<(), VmmClientError> {
        self.done(Request::PreCopy, image).await
    }

    /// Run again from frozen, persisting or durable.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn run(&self) -> Result<RunReport, VmmClientError> {
        self.ran(Request::Run).await
    }

    /// Give the memory of a machine that is durable as this generation back and lay its image out.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn doze(&self, generation: u64, image: &Fds<'_>) -> Result<(), VmmClientError> {
        self.done(Request::Doze { generation }, image).await
    }

    /// Run a durable or dozing machine on from its freeze, however long ago that was.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn resume(&self) -> Result<RunReport, VmmClientError> {
        self.ran(Request::Resume).await
    }

    async fn ran(&self, request: Request) -> Result<RunReport, VmmClientError> {
        let method = method_name(&request);
        match self.0.request(request, &[]).await? {
            Reply::Ran {
                persist_cancelled,
                run_us,
            } => Ok(RunReport {
                persist_cancelled,
                run_us,
            }),
            other => Err(unexpected(method, &other)),
        }
    }

    /// The first response byte left.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn first_byte(&self) -> Result<(), VmmClientError> {
        self.done(Request::FirstByte, &[]).await
    }

    /// Write all of guest memory to `dump`.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn dump(&self, dump: &OwnedFd) -> Result<(), VmmClientError> {
        self.done(Request::Dump, &[(FdRole::Dump, dump)]).await
    }

    /// Where the VMM stands.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn status(&self) -> Result<VmmStatus, VmmClientError> {
        match self.0.request(Request::Status, &[]).await? {
            Reply::Status {
                state,
                shape,
                version,
                persisted,
                counters,
            } => Ok(VmmStatus {
                state,
                shape,
                version,
                persisted,
                counters,
            }),
            other => Err(unexpected("status", &other)),
        }
    }

    /// End the VMM. It may be gone before it has answered, which is what was wanted.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn quit(&self) -> Result<(), VmmClientError> {
        match self.done(Request::Quit, &[]).await {
            Err(VmmClientError::Gone { .. }) => Ok(()),
            other => other,
        }
    }

    async fn done(&self, request: Request, fds: &Fds<'_>) -> Result<(), VmmClientError> {
        let method = method_name(&request);
        match self.0.request(request, fds).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(method, &other)),
        }
    }
}

fn unexpected(method: &'static str, reply: &Reply) -> VmmClientError {
    VmmClientError::UnexpectedReply {
        method,
        reply: format!("{reply:?}").chars().take(120).collect(),
    }
}

fn method_name(request: &Request) -> &'static str {
    match request {
        Request::Prepare { .. } => "prepare",
        Request::Boot { .. } => "boot",
        Request::Restore { .. } => "restore",
        Request::Freeze => "freeze",
        Request::Persist { .. } => "persist",
        Request::PreCopy => "pre_copy",
        Request::Run => "run",
        Request::Doze { .. } => "doze",
        Request::Resume => "resume",
        Request::FirstByte => "first_byte",
        Request::Dump => "dump",
        Request::Status => "status",
        Request::Quit => "quit",
    }
}
