//! What a client connection is doing, and how long it may do it.
//!
//! One [`Phase`] per HTTP connection, shared by the socket wrapper that sees bytes arrive, the service that takes
//! requests, and the task that drives the connection and gives up on it. hyper's own head timeout can't tell an
//! idle keep-alive connection from a client that dribbles a head, hence this. Requests under way are not bounded.

use crate::respond;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Accepted, and nothing received.
    Fresh { since: Instant },
    /// Part of a request's head has come.
    Head { since: Instant },
    /// Requests are held or being answered; more than one only over HTTP/2.
    Busy { n_requests: usize },
    /// Answered; the next request may come or not.
    Idle { since: Instant },
}

/// The state of one client connection.
#[derive(Debug)]
pub(crate) struct Phase {
    state: Mutex<State>,
    /// Bytes may come that belong to no request.
    multiplexed: AtomicBool,
    changed: Notify,
}

impl Phase {
    pub(crate) fn accepted() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Fresh {
                since: Instant::now(),
            }),
            multiplexed: AtomicBool::new(false),
            changed: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes_came(&self) {
        let mut state = self.state();
        let idle = matches!(*state, State::Idle { .. }) && !self.multiplexed.load(Ordering::Acquire);
        if idle || matches!(*state, State::Fresh { .. }) {
            *state = State::Head {
                since: Instant::now(),
            };
            self.changed.notify_one();
        }
    }

    /// A complete head is here; answers when its first byte came.
    pub(crate) fn request_began(&self) -> Instant {
        let mut state = self.state();
        let (n_before, began) = match *state {
            State::Head { since } => (0, since),
            State::Busy { n_requests } => (n_requests, Instant::now()),
            // Pipelined: its head was read together with the request before it.
            State::Fresh { .. } | State::Idle { .. } => (0, Instant::now()),
        };
        *state = State::Busy {
            n_requests: n_before + 1,
        };
        self.changed.notify_one();
        began
    }

    /// The client speaks HTTP/2.
    pub(crate) fn is_multiplexed(&self) {
        self.multiplexed.store(true, Ordering::Release);
    }

    /// Whether no request is complete that an answer could be for.
    pub(crate) fn awaits_head(&self) -> bool {
        matches!(*self.state(), State::Fresh { .. } | State::Head { .. })
    }

    /// The response has been handed over whole, or given up.
    fn response_ended(&self) {
        let mut state = self.state();
        *state = match *state {
            State::Busy { n_requests } if n_requests > 1 => State::Busy {
                n_requests: n_requests - 1,
            },
            State::Busy { .. } | State::Fresh { .. } | State::Head { .. } | State::Idle { .. } => {
                State::Idle {
                    since: Instant::now(),
                }
            }
        };
        self.changed.notify_one();
    }

    /// Returns when the client has taken too long. One task may wait.
    pub(crate) async fn overdue(&self, head_timeout: Duration, idle_timeout: Duration) {
        loop {
            let deadline = match *self.state() {
                State::Fresh { since } | State::Head { since } => Some(since + head_timeout),
                State::Idle { since } => Some(since + idle_timeout),
                State::Busy { .. } => None,
            };
            let Some(deadline) = deadline else {
                self.changed.notified().await;
                continue;
            };
            tokio::select! {
                () = sleep_until(deadline) => return,
                () = self.changed.notified() => {}
            }
        }
    }
}

/// A request under way; its drop ends it.
#[derive(Debug)]
pub(crate) struct UnderWay(Arc<Phase>);

impl UnderWay {
    pub(crate) fn on(phase: &Arc<Phase>) -> Self {
        Self(Arc::clone(phase))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.response_ended();
    }
}

/// A client's socket that reports the first bytes of a head, and gives hyper's own refusals their body.
#[derive(Debug)]
pub(crate) struct ClientSocket<S> {
    stream: S,
    phase: Arc<Phase>,
    /// What is written instead of hyper's bytes, and how much of it was.
    instead: Option<(Vec<u8>, usize)>,
}

impl<S> ClientSocket<S> {
    pub(crate) fn new(stream: S, phase: Arc<Phase>) -> Self {
        Self {
            stream,
            phase,
            instead: None,
        }
    }

    /// What hyper answers by itself to a head that it does not take has no body.
    fn look_for_refusal(&mut self, bytes: &[u8]) {
        if self.instead.is_none() && bytes.starts_with(b"HTTP/1.1 4") && self.phase.awaits_head() {
            self.instead = respond::instead_of(bytes).map(|bytes| (bytes, 0));
        }
    }
}

impl<S: AsyncWrite + Unpin> ClientSocket<S> {
    fn poll_instead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some((bytes, n_written)) = &mut self.instead {
            *n_written += ready!(Pin::new(&mut self.stream).poll_write(cx, &bytes[*n_written..]))?;
            if *n_written >= bytes.len() {
                self.instead = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ClientSocket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled_before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > filled_before {
            self.phase.bytes_came();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ClientSocket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.look_for_refusal(buf);
        if self.instead.is_some() {
            ready!(self.poll_instead(cx))?;
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(first) = bufs.iter().find(|buf| !buf.is_empty()) {
            self.look_for_refusal(first);
            if self.instead.is_some() {
                ready!(self.poll_instead(cx))?;
                return Poll::Ready(Ok(first.len()));
            }
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: Duration = Duration::from_secs(30);
    const IDLE: Duration = Duration::from_secs(90);

    async fn time_to_overdue(phase: &Phase) -> Duration {
        let began = Instant::now();
        phase.overdue(HEAD, IDLE).await;
        began.elapsed()
    }

    fn about(expected: Duration, measured: Duration) -> bool {
        measured >= expected && measured < expected + Duration::from_secs(1)
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_or_dribbling_client_gets_the_head_timeout() {
        let phase = Phase::accepted();
        assert!(about(HEAD, time_to_overdue(&phase).await));
        let phase = Phase::accepted();
        phase.bytes_came();
        let dribble = async {
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                phase.bytes_came();
            }
        };
        tokio::select! {
            taken = time_to_overdue(&phase) => assert!(about(HEAD, taken)),
            () = dribble => panic!("dribbling kept the connection alive"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_gets_the_idle_timeout() {
        let phase = Phase::accepted();
        phase.bytes_came();
        phase.request_began();
        phase.response_ended();
        assert!(about(IDLE, time_to_overdue(&phase).await));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_under_way_is_never_overdue_and_the_next_head_is_timed_anew() {
        let phase = Phase::accepted();
        phase.bytes_came();
        phase.request_began();
        let busy = tokio::time::timeout(Duration::from_secs(100_000), phase.overdue(HEAD, IDLE)).await;
        assert!(busy.is_err());
        phase.response_ended();
        tokio::time::sleep(Duration::from_secs(50)).await;
        phase.bytes_came();
        assert!(about(HEAD, time_to_overdue(&phase).await));
    }
}
