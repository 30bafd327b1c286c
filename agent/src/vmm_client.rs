//! Client of the control protocol: the only place that talks to a `torpor-vmm` process.
//!
//! One task per connection reads datagrams and hands each reply to the request that waits for it; events go
//! to one bounded queue. Requests are written by the caller itself, because a `SOCK_SEQPACKET` datagram is
//! atomic. End of file means that the VMM is gone: every waiting request fails with
//! [`VmmClientError::Gone`], and the event queue ends. A VMM is not trusted, since a guest may have taken it
//! over: a datagram that is no message, an answer to nothing and a flood of events all end the connection.
//!
//! Not its job: deciding what to ask, and starting or reaping processes.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use torpor_api::vmm::{
    Event, FdRole, Message, Outcome, PersistStats, Reply, Request, RequestFrame, RestoreTrace, Shape,
    VmmError, VmmState,
};
use torpor_ipc::IpcError;

/// Events that may wait for a reader; a VMM sends a handful in its life.
const EVENT_QUEUE: usize = 16;
/// Requests that may wait for a reply at the same time.
const MAX_PENDING: usize = 64;
/// Longest wait for any reply. A VMM that is silent for longer is as good as gone.
pub const REPLY_DEADLINE: Duration = Duration::from_secs(60);

/// Why a VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmClientError {
    /// Nobody listens at the socket.
    #[error("cannot connect to the VMM at {}", path.display())]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: IpcError,
    },
    /// The socket could not be given to the event loop.
    #[error("cannot watch the control socket")]
    Watch {
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The request could not be written.
    #[error("cannot send {method} to the VMM")]
    Send {
        /// What was asked.
        method: &'static str,
        /// Why not.
        #[source]
        source: IpcError,
    },
    /// The request could not be encoded.
    #[error("cannot encode {method}")]
    Encode {
        /// What was asked.
        method: &'static str,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The connection ended before the reply.
    #[error("the VMM is gone, {method} was not answered")]
    Gone {
        /// What was asked.
        method: &'static str,
    },
    /// No reply in [`REPLY_DEADLINE`].
    #[error("the VMM did not answer {method} in {after:?}")]
    TimedOut {
        /// What was asked.
        method: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// Too many requests wait already.
    #[error("{method} refused: {MAX_PENDING} requests wait for the VMM")]
    Busy {
        /// What was asked.
        method: &'static str,
    },
    /// The VMM said no.
    #[error("the VMM refused {method}")]
    Refused {
        /// What was asked.
        method: &'static str,
        /// Its answer.
        #[source]
        source: VmmError,
    },
    /// A reply of another kind than the request's.
    #[error("the VMM answered {method} with {reply}")]
    UnexpectedReply {
        /// What was asked.
        method: &'static str,
        /// What came.
        reply: String,
    },
}

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
    pub counters: torpor_api::vmm::Counters,
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

struct Shared {
    /// A `SOCK_SEQPACKET` socket under the type that tokio has for unix sockets; only readiness is used of it.
    socket: UnixStream,
    pending: Mutex<HashMap<u64, oneshot::Sender<Outcome>>>,
    next_id: AtomicU64,
    closed: CancellationToken,
}

impl Shared {
    fn pending(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Outcome>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection to one VMM. Dropping the last clone ends it and changes nothing for the guest.
#[derive(Clone)]
pub struct VmmClient {
    shared: Arc<Shared>,
    _reader: Arc<Reader>,
}

/// The task that reads; it ends with the last clone of its client.
struct Reader(tokio::task::AbortHandle);

/// What one VMM reports by itself; ends with the connection.
pub struct VmmEvents(mpsc::Receiver<Event>);

impl VmmEvents {
    /// The next event, or `None` once the VMM is gone.
    pub async fn next(&mut self) -> Option<Event> {
        self.0.recv().await
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
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
        let shared = Arc::new(Shared {
            socket: UnixStream::from_std(socket.into()).map_err(|source| VmmClientError::Watch { source })?,
            pending: Mutex::default(),
            next_id: AtomicU64::new(1),
            closed: CancellationToken::new(),
        });
        let (events_in, events) = mpsc::channel(EVENT_QUEUE);
        let task = tokio::spawn(read_messages(shared.clone(), events_in));
        let _reader = Arc::new(Reader(task.abort_handle()));
        Ok((Self { shared, _reader }, VmmEvents(events)))
    }

    /// Wait until the connection has ended.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.closed.is_cancelled()
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
        match self.request(request, fds).await? {
            Reply::Restored { trace } => Ok(trace),
            other => Err(unexpected("restore", &other)),
        }
    }

    /// Stop the vCPUs; answers how long that took in microseconds.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn freeze(&self) -> Result<u64, VmmClientError> {
        match self.request(Request::Freeze, &[]).await? {
            Reply::Frozen { freeze_us } => Ok(freeze_us),
            other => Err(unexpected("freeze", &other)),
        }
    }

    /// Begin to write the image; the end is an event.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn persist(&self, generation: u64, image: &OwnedFd) -> Result<(), VmmClientError> {
        self.done(Request::Persist { generation }, &[(FdRole::Image, image)])
            .await
    }

    /// Run again from frozen, persisting or durable.
    ///
    /// # Errors
    /// See [`VmmClientError`].
    pub async fn run(&self) -> Result<RunReport, VmmClientError> {
        match self.request(Request::Run, &[]).await? {
            Reply::Ran {
                persist_cancelled,
                run_us,
            } => Ok(RunReport {
                persist_cancelled,
                run_us,
            }),
            other => Err(unexpected("run", &other)),
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
        match self.request(Request::Status, &[]).await? {
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
        match self.request(request, fds).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(method, &other)),
        }
    }

    async fn request(&self, request: Request, fds: &Fds<'_>) -> Result<Reply, VmmClientError> {
        let method = method_name(&request);
        let frame = RequestFrame {
            id: self.shared.next_id.fetch_add(1, Ordering::Relaxed),
            fds: fds.iter().map(|(role, _)| *role).collect(),
            request,
        };
        let bytes = serde_json::to_vec(&frame).map_err(|source| VmmClientError::Encode { method, source })?;
        let raw: Vec<RawFd> = fds.iter().map(|(_, fd)| fd.as_fd().as_raw_fd()).collect();
        let waiting = Waiting::register(&self.shared, frame.id, method)?;
        self.send(method, &bytes, &raw).await?;
        waiting.outcome(method).await
    }

    async fn send(&self, method: &'static str, bytes: &[u8], fds: &[RawFd]) -> Result<(), VmmClientError> {
        let socket = &self.shared.socket;
        let sent = socket.async_io(Interest::WRITABLE, || ready(torpor_ipc::send(socket, bytes, fds)));
        match sent.await.map_err(|source| VmmClientError::Watch { source })? {
            Ok(()) => Ok(()),
            Err(IpcError::Closed) => Err(VmmClientError::Gone { method }),
            Err(source) => Err(VmmClientError::Send { method, source }),
        }
    }
}

/// A place in the table of requests under way; leaves the table when dropped.
struct Waiting<'a> {
    shared: &'a Shared,
    id: u64,
    reply: oneshot::Receiver<Outcome>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.pending().remove(&self.id);
    }
}

impl<'a> Waiting<'a> {
    fn register(shared: &'a Shared, id: u64, method: &'static str) -> Result<Self, VmmClientError> {
        let (answer, reply) = oneshot::channel();
        let mut pending = shared.pending();
        // Under the lock of the table that the reader clears after this flag is up: none can be forgotten.
        if shared.closed.is_cancelled() {
            return Err(VmmClientError::Gone { method });
        }
        if pending.len() >= MAX_PENDING {
            return Err(VmmClientError::Busy { method });
        }
        pending.insert(id, answer);
        drop(pending);
        Ok(Self { shared, id, reply })
    }

    async fn outcome(mut self, method: &'static str) -> Result<Reply, VmmClientError> {
        match tokio::time::timeout(REPLY_DEADLINE, &mut self.reply).await {
            Err(_) => Err(VmmClientError::TimedOut {
                method,
                after: REPLY_DEADLINE,
            }),
            Ok(Err(_)) => Err(VmmClientError::Gone { method }),
            Ok(Ok(Outcome::Err(source))) => Err(VmmClientError::Refused { method, source }),
            Ok(Ok(Outcome::Ok(reply))) => Ok(reply),
        }
    }
}

/// Read until the VMM is gone or says something that makes no sense.
async fn read_messages(shared: Arc<Shared>, events: mpsc::Sender<Event>) {
    let _closing = Closing(shared.clone());
    loop {
        // A VMM that never stops talking must not keep a worker thread to itself.
        tokio::task::coop::consume_budget().await;
        let socket = &shared.socket;
        let received = socket.async_io(Interest::READABLE, || ready(torpor_ipc::receive(socket)));
        match received.await {
            Err(error) => {
                tracing::warn!(%error, "cannot watch the control connection");
                return;
            }
            Ok(Err(IpcError::Closed)) => return,
            Ok(Err(error)) => {
                tracing::warn!(%error, "control connection failed");
                return;
            }
            Ok(Ok(datagram)) => match serde_json::from_slice(&datagram.bytes) {
                Ok(Message::Reply { id, outcome }) => {
                    // A reply to nobody belongs to a request whose caller gave up.
                    if let Some(answer) = shared.pending().remove(&id) {
                        let _ = answer.send(outcome);
                    }
                }
                Ok(Message::Event { event }) => {
                    if events.try_send(event).is_err_and(|error| is_full(&error)) {
                        tracing::warn!("VMM sends more events than it can have");
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "VMM sent a datagram that is no message");
                    return;
                }
            },
        }
    }
}

/// What the event loop must know of a try: whether it would have blocked.
fn ready<T>(result: Result<T, IpcError>) -> std::io::Result<Result<T, IpcError>> {
    match result {
        Err(IpcError::WouldBlock) => Err(std::io::ErrorKind::WouldBlock.into()),
        other => Ok(other),
    }
}

fn is_full(error: &mpsc::error::TrySendError<Event>) -> bool {
    matches!(error, mpsc::error::TrySendError::Full(_))
}

/// Fails what still waits, however the reader ends.
struct Closing(Arc<Shared>);

impl Drop for Closing {
    fn drop(&mut self) {
        let mut pending = self.0.pending();
        self.0.closed.cancel();
        pending.clear();
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
        Request::Run => "run",
        Request::FirstByte => "first_byte",
        Request::Dump => "dump",
        Request::Status => "status",
        Request::Quit => "quit",
    }
}
