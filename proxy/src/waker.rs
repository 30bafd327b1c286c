//! What the proxy asks of whoever knows machines.
//!
//! Owns the [`Waker`] trait and the types that pass through it. The proxy calls [`Waker::connect`] once for
//! every HTTP request and once for every TCP connection, so an implementation sees all traffic: it can wake,
//! cancel a pause, count activity and refuse. Nothing here does I/O.

use async_trait::async_trait;
use std::any::Any;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use torpor_api::{ErrorCode, ExecutionId};

/// `Retry-After` of a refusal whose author names none.
pub const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(5);

/// Turns a target into a connected stream, waking its machine if need be and allowed.
#[async_trait]
pub trait Waker: Send + Sync + 'static {
    /// A connected stream to the target.
    ///
    /// May take as long as a wake takes. Dropping the future cancels this waiter and must cancel nothing else:
    /// a wake that others wait for, or that has begun, goes on.
    async fn connect(&self, request: WakeRequest) -> Result<Connected, WakeRefusal>;

    /// Whether an HTTP request may pass at all; asked before [`Waker::connect`], and must wake nothing.
    /// Without an implementation everybody may.
    async fn admit(&self, request: &WakeRequest, shown: &Shown) -> Result<Admission, WakeRefusal> {
        let _ = shown;
        Ok(Admission::open(request.target.clone()))
    }
}

/// The way to one machine for a connection that may outlast pauses. Its drop says that the connection has ended.
#[async_trait]
pub trait Line: Send + Sync + 'static {
    /// Leave to pass payload to the guest; wakes the machine if it sleeps, within the same bounds as a request.
    async fn awake(&self) -> Result<Awake, WakeRefusal>;

    /// Leave to pass what is no activity to the guest; `None` while the machine does not run.
    fn enter_quietly(&self) -> Option<Guard>;

    /// Cancelled when the guest's memory, and its end of the connection with it, is gone.
    fn over(&self) -> &CancellationToken;
}

/// Leave to pass payload.
pub struct Awake {
    /// While it is held, a pause waits a little.
    pub guard: Guard,
    /// Called when the guest answers, if the machine was woken.
    pub on_first_byte: Option<FirstByteHook>,
}

/// What an HTTP request shows to be let in. All of it is the client's word.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Shown {
    /// Query key `edge_token`.
    pub query_token: Option<String>,
    /// Header `x-edge-token`.
    pub header_token: Option<String>,
    /// Cookies that the proxy set, by the scope that [`EdgeCookie::scope`] gave them.
    pub cookies: Vec<(String, String)>,
    /// Header `Authorization`.
    pub authorization: Option<String>,
    /// The request asks to speak another protocol.
    pub upgrade: bool,
}

/// Leave to go on.
#[derive(Debug, Clone)]
pub struct Admission {
    /// What to connect to; may name more exactly what the request asked for.
    pub target: Target,
    /// Query key and header of the edge token end here.
    pub took_token: bool,
    /// The header `Authorization` ends here.
    pub took_authorization: bool,
    /// A cookie for the client.
    pub cookie: Option<EdgeCookie>,
    /// Where its payload bytes are counted besides the machine's.
    pub also_count: Option<std::sync::Arc<Activity>>,
}

impl Admission {
    /// Anybody may.
    #[must_use]
    pub fn open(target: Target) -> Self {
        Self {
            target,
            took_token: false,
            took_authorization: false,
            cookie: None,
            also_count: None,
        }
    }
}

/// A cookie by which a browser shows its token again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeCookie {
    /// Part of its name: cookies do not tell ports apart.
    pub scope: String,
    /// The token.
    pub value: String,
    /// How long it is kept.
    pub max_age_seconds: u64,
}

/// What a client wants to reach.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// The service behind a port of the proxy's own.
    Service {
        /// The port that [`crate::Proxy::expose`] bound.
        listen_port: u16,
    },
    /// A port of a machine, named in the `Host` header as `<port>-<machine>.<domain>`.
    HostName {
        /// Port in the guest.
        port: u16,
        /// Name, machine ID or execution ID as the client wrote it, in lower case. Not validated.
        machine: String,
    },
}

/// What kind of traffic asks; a wake policy may tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// An HTTP request.
    Http,
    /// A request that asks for an upgrade.
    Upgrade,
    /// A TCP connection.
    Tcp,
}

/// Who knocked, for the events table. Texts are cut to [`Cause::MAX_TEXT_BYTES`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cause {
    /// HTTP method.
    pub method: Option<String>,
    /// Path without the query, which may hold secrets.
    pub path: Option<String>,
    /// `User-Agent` header.
    pub user_agent: Option<String>,
}

impl Cause {
    /// Longest text that is kept of a header or path.
    pub const MAX_TEXT_BYTES: usize = 256;
}

/// One request for a connection.
#[derive(Debug, Clone)]
pub struct WakeRequest {
    /// What to reach.
    pub target: Target,
    /// How.
    pub transport: Transport,
    /// The client's address.
    pub client: SocketAddr,
    /// When the first byte of the request's head came; for TCP, when the connection was accepted.
    pub accepted_at: Instant,
    /// Details for the events table.
    pub cause: Cause,
    /// The proxy still holds an idle connection to this execution. If that is the execution that runs now,
    /// the answer may be [`Upstream::Held`] instead of a new stream.
    pub held: Option<ExecutionId>,
}

/// The way to the guest.
#[derive(Debug)]
pub enum Upstream {
    /// A new connection, made inside the machine's slot.
    Fresh(TcpStream),
    /// Use the connection that [`WakeRequest::held`] names: its execution is alive and running.
    Held,
}

/// A running machine, ready for the bytes of one request or connection.
pub struct Connected {
    /// The way to the guest.
    pub upstream: Upstream,
    /// The execution it leads to. A held connection is used again only for the same execution.
    pub execution: ExecutionId,
    /// Cancelled when that execution is over, so that whatever is still under way on it ends at once instead
    /// of waiting for TCP to notice. A token that is never cancelled is allowed.
    pub over: CancellationToken,
    /// Where payload bytes are counted, usually one per machine.
    pub activity: std::sync::Arc<Activity>,
    /// Held until the response is complete, or the upgraded or TCP connection ended. With a [`Connected::line`]
    /// only until the upgrade.
    pub guard: Option<Guard>,
    /// How an upgraded or TCP connection outlasts pauses; without one it ends with its execution.
    pub line: Option<std::sync::Arc<dyn Line>>,
    /// The stages of the wake, if this request caused one or waited for one.
    pub trace: Option<WakeTrace>,
    /// Called once when the first byte of the answer has come from the guest, with the time since
    /// [`WakeRequest::accepted_at`]. Not called if there is no answer.
    pub on_first_byte: Option<FirstByteHook>,
}

impl Connected {
    /// A fresh connection with nothing to count, trace or hold.
    #[must_use]
    pub fn fresh(stream: TcpStream, execution: ExecutionId) -> Self {
        Self::new(Upstream::Fresh(stream), execution)
    }

    /// Leave to use the connection that the proxy holds.
    #[must_use]
    pub fn held(execution: ExecutionId) -> Self {
        Self::new(Upstream::Held, execution)
    }

    fn new(upstream: Upstream, execution: ExecutionId) -> Self {
        Self {
            upstream,
            execution,
            over: CancellationToken::new(),
            activity: std::sync::Arc::default(),
            guard: None,
            line: None,
            trace: None,
            on_first_byte: None,
        }
    }
}

impl fmt::Debug for Connected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connected")
            .field("upstream", &self.upstream)
            .field("execution", &self.execution)
            .field("trace", &self.trace)
            .finish_non_exhaustive()
    }
}

/// Anything whose drop tells its maker that the request or connection is over.
pub type Guard = Box<dyn Any + Send + Sync>;

/// See [`Connected::on_first_byte`].
pub type FirstByteHook = Box<dyn FnOnce(Duration) + Send + Sync>;

/// Stages of a wake in the order they happened, each with its own duration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WakeTrace {
    /// Name and duration; names are `Server-Timing` tokens such as `state_loaded`.
    pub stages: Vec<(&'static str, Duration)>,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({})", code.as_str())]
pub struct WakeRefusal {
    /// Stable code; its status and retryability go to the client.
    pub code: ErrorCode,
    /// What failed, on what.
    pub message: String,
    /// When to come again; a 503 without one says [`DEFAULT_RETRY_AFTER`].
    pub retry_after: Option<Duration>,
    /// What an HTTP client is told instead of the code.
    pub answer: Option<Box<OwnAnswer>>,
}

/// An answer that somebody configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnAnswer {
    /// HTTP status.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: String,
    /// Body.
    pub body: String,
}

impl WakeRefusal {
    /// A refusal with the code's own advice.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retry_after: None,
            answer: None,
        }
    }
}

/// Payload bytes that passed and requests that wait for their answer, for sliding leases. Cheap to bump from many
/// connections.
#[derive(Debug, Default)]
pub struct Activity {
    to_guest_bytes: AtomicU64,
    from_guest_bytes: AtomicU64,
    n_unanswered: AtomicUsize,
}

/// A request that the guest has not begun to answer, until this is dropped.
pub(crate) struct Unanswered(Arc<Activity>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.n_unanswered.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Activity {
    /// Bytes of request bodies, TCP and upgraded connections towards the guest.
    #[must_use]
    pub fn to_guest_bytes(&self) -> u64 {
        self.to_guest_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of response bodies, TCP and upgraded connections from the guest.
    #[must_use]
    pub fn from_guest_bytes(&self) -> u64 {
        self.from_guest_bytes.load(Ordering::Relaxed)
    }

    /// Requests that the guest has and has not begun to answer: somebody waits for work that it does.
    #[must_use]
    pub fn n_unanswered(&self) -> usize {
        self.n_unanswered.load(Ordering::Relaxed)
    }

    pub(crate) fn unanswered(self: &Arc<Self>) -> Unanswered {
        self.n_unanswered.fetch_add(1, Ordering::Relaxed);
        Unanswered(Arc::clone(self))
    }

    pub(crate) fn add(&self, direction: Direction, len_bytes: usize) {
        let counter = match direction {
            Direction::ToGuest => &self.to_guest_bytes,
            Direction::FromGuest => &self.from_guest_bytes,
        };
        counter.fetch_add(len_bytes as u64, Ordering::Relaxed);
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    ToGuest,
    FromGuest,
}
