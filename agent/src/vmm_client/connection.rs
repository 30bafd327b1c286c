//! One connection: datagrams out by the caller, datagrams in by a task, replies matched to requests by number.
//!
//! The task ends at end of file, or when the VMM breaks the protocol; whatever still waits then fails. Dropping
//! the last clone ends the task.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use torpor_api::vmm::{Event, Message, Outcome, Reply, Request, RequestFrame};
use torpor_ipc::IpcError;

use super::{Fds, REPLY_DEADLINE, VmmClientError, method_name};

/// Events that may wait for a reader; a VMM sends a handful in its life.
const EVENT_QUEUE: usize = 16;
/// Requests that may wait for a reply at the same time.
pub(super) const MAX_PENDING: usize = 64;

struct Shared {
    /// A `SOCK_SEQPACKET` socket under the type that tokio has for unix sockets; only readiness is used of it.
    socket: UnixStream,
    pending: Mutex<HashMap<u64, oneshot::Sender<Outcome>>>,
    next_id: AtomicU64,
    closed: CancellationToken,
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Outcome>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task that reads; it ends with the last clone of its connection.
struct Reader(tokio::task::AbortHandle);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A connection to one VMM.
#[derive(Clone)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    _reader: Arc<Reader>,
}

impl Connection {
    /// Speak over a connected, non-blocking socket.
    pub(super) fn open(socket: OwnedFd) -> Result<(Self, mpsc::Receiver<Event>), VmmClientError> {
        let shared = Arc::new(Shared {
            socket: UnixStream::from_std(socket.into()).map_err(|source| VmmClientError::Watch { source })?,
            pending: Mutex::default(),
            next_id: AtomicU64::new(1),
            closed: CancellationToken::new(),
        });
        let (events_in, events) = mpsc::channel(EVENT_QUEUE);
        let task = tokio::spawn(read_messages(shared.clone(), events_in));
        let _reader = Arc::new(Reader(task.abort_handle()));
        Ok((Self { shared, _reader }, events))
    }

    /// Ends with the connection.
    pub(super) fn closed(&self) -> &CancellationToken {
        &self.shared.closed
    }

    /// Ask, and wait for the reply of the same number.
    pub(super) async fn request(&self, request: Request, fds: &Fds<'_>) -> Result<Reply, VmmClientError> {
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
