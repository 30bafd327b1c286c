//! What a client connection is doing, and how long it may do it.
//!
//! One [`Phase`] per HTTP connection, shared by the socket wrapper that sees bytes arrive, the service that takes
//! requests, and the task that drives the connection and gives up on it. hyper's own head timeout can't tell an
//! idle keep-alive connection from a client that dribbles a head, hence this. Requests under way are not bounded.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Accepted, and nothing received.
    Fresh { since: Instant },
    /// Part of a request's head has come.
    Head { since: Instant },
    /// A request is held or being answered.
    Busy,
    /// Answered; the next request may come or not.
    Idle { since: Instant },
}

/// The state of one client connection.
#[derive(Debug)]
pub(crate) struct Phase {
    state: Mutex<State>,
    changed: Notify,
}

impl Phase {
    pub(crate) fn accepted() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Fresh {
                since: Instant::now(),
            }),
            changed: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bytes_came(&self) {
        let mut state = self.state();
        if matches!(*state, State::Fresh { .. } | State::Idle { .. }) {
            *state = State::Head {
                since: Instant::now(),
            };
            self.changed.notify_one();
        }
    }

    /// A complete head is here; answers when its first byte came.
    pub(crate) fn request_began(&self) -> Instant {
        let began = std::mem::replace(&mut *self.state(), State::Busy);
        self.changed.notify_one();
        match began {
            State::Head { since } => since,
            // Pipelined: its head was read together with the request before it.
            State::Fresh { .. } | State::Busy | State::Idle { .. } => Instant::now(),
        }
    }

    /// The response has been handed over whole, or given up.
    fn response_ended(&self) {
        *self.state() = State::Idle {
            since: Instant::now(),
        };
        self.changed.notify_one();
    }

    /// Returns when the client has taken too long. One task may wait.
    pub(crate) async fn overdue(&self, head_timeout: Duration, idle_timeout: Duration) {
        loop {
            let deadline = match *self.state() {
                State::Fresh { since } | State::Head { since } => Some(since + head_timeout),
                State::Idle { since } => Some(since + idle_timeout),
                State::Busy => None,
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

/// A client's socket that reports the first bytes of a head.
#[derive(Debug)]
pub(crate) struct ClientSocket {
    stream: TcpStream,
    phase: Arc<Phase>,
}

impl ClientSocket {
    pub(crate) fn new(stream: TcpStream, phase: Arc<Phase>) -> Self {
        Self { stream, phase }
    }
}

impl AsyncRead for ClientSocket {
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

impl AsyncWrite for ClientSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
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
