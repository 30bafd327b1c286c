//! Bodies that are counted while they pass, and that hold what must last as long as they do.
//!
//! [`RequestBody`] and [`ResponseBody`] wrap HTTP bodies. None of them buffers: a frame is asked for only when the
//! other side takes it, which is all the back-pressure there is.

use crate::phase::UnderWay;
use crate::waker::{Activity, Direction, Guard};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How long a body waits for a guest that ignores `Expect: 100-continue` (RFC 9110, 10.1.1).
const CONTINUE_PATIENCE: Duration = Duration::from_secs(1);

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the client's body broke off")]
    Client(#[source] hyper::Error),
    #[error("the guest's body broke off")]
    Guest(#[source] hyper::Error),
    #[error("the execution ended before its response did")]
    ExecutionOver,
}

/// Where payload bytes are counted: with the machine, and with the grant that let them in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    pub(crate) machine: Arc<Activity>,
    pub(crate) also: Option<Arc<Activity>>,
}

impl Tally {
    fn add(&self, direction: Direction, len_bytes: usize) {
        self.add_parts(direction, len_bytes, len_bytes);
    }

    /// Counts the payload with the machine and everything with the grant.
    pub(crate) fn add_parts(&self, direction: Direction, len_payload_bytes: usize, len_bytes: usize) {
        self.machine.add(direction, len_payload_bytes);
        if let Some(also) = &self.also {
            also.add(direction, len_bytes);
        }
    }
}

type Gate = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A client's body on its way to the guest.
pub(crate) struct RequestBody {
    incoming: Incoming,
    tally: Tally,
    gate: Option<Gate>,
    broken: Arc<AtomicBool>,
}

impl RequestBody {
    pub(crate) fn new(incoming: Incoming) -> Self {
        Self {
            incoming,
            tally: Tally::default(),
            gate: None,
            broken: Arc::default(),
        }
    }

    /// Counts its bytes there from now on.
    pub(crate) fn count_in(&mut self, tally: Tally) {
        self.tally = tally;
    }

    /// Keeps the body, and with it our own `100 Continue`, back until `go_on` is notified or patience ends.
    pub(crate) fn wait_for(&mut self, go_on: Arc<Notify>) {
        self.gate = Some(Box::pin(async move {
            // Either way the body goes on.
            let _ = tokio::time::timeout(CONTINUE_PATIENCE, go_on.notified()).await;
        }));
    }

    /// Becomes true when the client's side of the body is at fault for a failed request.
    pub(crate) fn broken(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.broken)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(gate) = &mut self.gate {
            ready!(gate.as_mut().poll(cx));
            self.gate = None;
        }
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            let frame = frame.map_err(|source| {
                self.broken.store(true, Ordering::Release);
                BodyError::Client(source)
            })?;
            self.tally
                .add(Direction::ToGuest, frame.data_ref().map_or(0, Bytes::len));
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// A response's body on its way to the client; its drop ends the request.
pub(crate) struct ResponseBody {
    source: Source,
    under_way: Option<UnderWay>,
}

enum Source {
    Own(Full<Bytes>),
    Guest(GuestBody),
}

struct GuestBody {
    incoming: Incoming,
    tally: Tally,
    over: CancellationToken,
    _guard: Option<Guard>,
}

impl ResponseBody {
    /// A body of the proxy's own.
    pub(crate) fn own(text: Bytes) -> Self {
        Self {
            source: Source::Own(Full::new(text)),
            under_way: None,
        }
    }

    /// A guest's body, which fails if its execution ends first.
    pub(crate) fn guest(
        incoming: Incoming,
        tally: Tally,
        over: CancellationToken,
        guard: Option<Guard>,
    ) -> Self {
        let body = GuestBody {
            incoming,
            tally,
            over,
            _guard: guard,
        };
        Self {
            source: Source::Guest(body),
            under_way: None,
        }
    }

    /// Drops `under_way` when the body is through or given up.
    pub(crate) fn ends(mut self, under_way: UnderWay) -> Self {
        self.under_way = Some(under_way);
        self
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.source {
            Source::Own(full) => Pin::new(full).poll_frame(cx).map_err(|never| match never {}),
            Source::Guest(body) => body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Own(full) => full.is_end_stream(),
            Source::Guest(body) => body.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Own(full) => full.size_hint(),
            Source::Guest(body) => body.incoming.size_hint(),
        }
    }
}

impl GuestBody {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match ready!(Pin::new(&mut self.incoming).poll_frame(cx)) {
            Some(Ok(frame)) => {
                self.tally
                    .add(Direction::FromGuest, frame.data_ref().map_or(0, Bytes::len));
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(source)) => Poll::Ready(Some(Err(BodyError::Guest(source)))),
            // The connection's task was ended with its execution; hyper reports that as a clean end.
            None if self.over.is_cancelled() => Poll::Ready(Some(Err(BodyError::ExecutionOver))),
            None => Poll::Ready(None),
        }
    }
}
