//! Client of the agent inside a guest: the only place that speaks the frame protocol of
//! [`torpor_api::guest`].
//!
//! Every operation opens its own connection to the machine's `vsock.sock`, asks the VMM for the agent's port
//! with one `CONNECT` line and carries one request. The guest is hostile: frames are bounded by the protocol,
//! collected output by [`torpor_api::limits::MAX_EXEC_OUTPUT`], and every operation that has an end by
//! nature has a deadline. No task of its own; an operation ends when its future is dropped.
//!
//! [`channel`] owns connection and frames, [`exec`] processes, [`files`] files, [`usage`] figures and holds.

pub mod channel;
pub mod exec;
pub mod files;
pub mod usage;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use tokio::time::Instant;
use torpor_api::guest::{FrameType, GuestError, GuestRequest, GuestResponse};

use channel::{Channel, Dial, Vsock};

/// Longest wait for an answer that needs no work in the guest.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);
/// First and longest pause between two tries to reach an agent that isn't there yet.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
/// Bytes of entropy that a resync brings.
const ENTROPY_LEN: usize = 32;

/// Why an operation in the guest failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestClientError {
    /// The VMM's socket can't be reached.
    #[error("cannot connect to the guest at {}", path.display())]
    Connect {
        /// The vsock socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The guest accepts nothing on this vsock port, or the VMM said something else than `OK`.
    #[error("guest does not accept on vsock port {port} (answer {answer:?})")]
    NotListening {
        /// vsock port.
        port: u32,
        /// What the VMM said.
        answer: String,
    },
    /// The connection broke.
    #[error("cannot {operation} the guest agent")]
    Io {
        /// Direction.
        operation: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The guest closed before it had answered.
    #[error("guest agent closed the connection before it answered")]
    Closed,
    /// A frame that has no place here.
    #[error("guest agent broke the protocol: {what}")]
    Protocol {
        /// What was wrong.
        what: String,
    },
    /// The agent said no.
    #[error("guest agent refused")]
    Refused {
        /// Its answer.
        #[source]
        source: GuestError,
    },
    /// No answer in time.
    #[error("guest agent did not answer {operation} in {after:?}")]
    TimedOut {
        /// What was asked.
        operation: &'static str,
        /// How long it had.
        after: Duration,
    },
}

/// What a resync did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resynced {
    /// By how much the guest's wall clock was stepped, in nanoseconds.
    pub step_ns: i64,
    /// The guest's wall clock after the step, in Unix nanoseconds.
    pub wall_unix_ns: u64,
}

/// Where the agent of one guest is reached.
#[derive(Clone)]
pub struct GuestClient {
    way: Arc<dyn Dial>,
}

impl GuestClient {
    /// The agent behind this vsock socket.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self::over(Arc::new(Vsock(socket.to_owned())))
    }

    /// The agent at the end of this way.
    #[must_use]
    pub fn over(way: Arc<dyn Dial>) -> Self {
        Self { way }
    }

    /// A connection that begins with this request.
    async fn open(
        &self,
        operation: &'static str,
        request: &GuestRequest,
    ) -> Result<Channel, GuestClientError> {
        bounded(operation, ANSWER_DEADLINE, self.ask(request)).await
    }

    /// Wait until a booting guest's agent answers; gives up at `deadline`.
    ///
    /// # Errors
    /// What the last try met.
    pub async fn wait_ready(&self, deadline: Instant) -> Result<String, GuestClientError> {
        let mut pause = RETRY_PAUSE.0;
        loop {
            // The VMM holds a connection until the guest's driver is there; then the guest refuses it until the
            // agent listens. Nothing tells when that is, so this one place tries again.
            let attempt = tokio::time::timeout_at(deadline, self.ping()).await;
            match attempt {
                Ok(Ok(version)) => return Ok(version),
                Ok(Err(error)) if Instant::now() + pause >= deadline => return Err(error),
                Ok(Err(error)) => tracing::trace!(%error, "guest agent is not there yet"),
                Err(_) => {
                    return Err(GuestClientError::TimedOut {
                        operation: "ping",
                        after: ANSWER_DEADLINE,
                    });
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE.1);
        }
    }

    /// The agent's version.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn ping(&self) -> Result<String, GuestClientError> {
        match self.call("ping", &GuestRequest::Ping).await? {
            GuestResponse::Pong { version } => Ok(version),
            other => Err(unexpected("ping", &other)),
        }
    }

    /// A connection to the agent that nothing was asked on, for a guest that may not run yet.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn knock(&self) -> Result<Channel, GuestClientError> {
        self.way.dial().await
    }

    /// Step the guest's wall clock to the host's and stir its entropy pool, by a connection of [`Self::knock`]. The clock is
    /// read just before the request is written, which should be when the guest has begun to run. The request does not wait
    /// for the connection to be accepted: both are there when the guest looks.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn resync(&self, channel: &mut Channel) -> Result<Resynced, GuestClientError> {
        let entropy: [u8; ENTROPY_LEN] = rand::random();
        let entropy = base64::engine::general_purpose::STANDARD.encode(entropy);
        let exchange = async {
            let wall_unix_ns = wall_unix_ns();
            channel
                .send_request(&GuestRequest::Resync {
                    wall_unix_ns,
                    entropy,
                })
                .await?;
            channel.response().await
        };
        match bounded("resync", ANSWER_DEADLINE, exchange).await? {
            GuestResponse::Resynced {
                step_ns,
                wall_unix_ns,
            } => Ok(Resynced {
                step_ns,
                wall_unix_ns,
            }),
            other => Err(unexpected("resync", &other)),
        }
    }

    /// Whether anything in the guest accepts on this TCP port.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn probe(&self, port: u16) -> Result<bool, GuestClientError> {
        match self.call("probe", &GuestRequest::Probe { port }).await? {
            GuestResponse::Probed { listening } => Ok(listening),
            other => Err(unexpected("probe", &other)),
        }
    }

    /// Flush dirty data of the guest to its disk.
    ///
    /// # Errors
    /// See [`GuestClientError`]; [`GuestClientError::TimedOut`] after `limit`.
    pub async fn quiesce(&self, limit: Duration) -> Result<(), GuestClientError> {
        bounded("quiesce", limit, self.done("quiesce", &GuestRequest::Quiesce)).await
    }

    /// Power off or reboot the guest, cleanly.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn shutdown(&self, reboot: bool) -> Result<(), GuestClientError> {
        self.done("shutdown", &GuestRequest::Shutdown { reboot }).await
    }

    /// Signal the group of a process that an exec started.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn signal_group(&self, pid: u32, signal: i32) -> Result<(), GuestClientError> {
        self.done("signal", &GuestRequest::SignalGroup { pid, signal })
            .await
    }

    pub(crate) async fn done(
        &self,
        operation: &'static str,
        request: &GuestRequest,
    ) -> Result<(), GuestClientError> {
        match self.call(operation, request).await? {
            GuestResponse::Done => Ok(()),
            other => Err(unexpected(operation, &other)),
        }
    }

    /// One request and its one response.
    async fn call(
        &self,
        operation: &'static str,
        request: &GuestRequest,
    ) -> Result<GuestResponse, GuestClientError> {
        bounded(operation, ANSWER_DEADLINE, async {
            self.ask(request).await?.response().await
        })
        .await
    }

    async fn ask(&self, request: &GuestRequest) -> Result<Channel, GuestClientError> {
        let mut channel = self.way.dial().await?;
        channel.accepted().await?;
        channel.send_request(request).await?;
        Ok(channel)
    }
}

async fn bounded<T>(
    operation: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, GuestClientError>>,
) -> Result<T, GuestClientError> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(GuestClientError::TimedOut {
            operation,
            after: limit,
        }),
    }
}

fn wall_unix_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    // Years before 1970 and after 2554 have no number here.
    since_epoch.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

pub(crate) fn unexpected(operation: &'static str, response: &GuestResponse) -> GuestClientError {
    let what: String = format!("{operation} answered with {response:?}")
        .chars()
        .take(160)
        .collect();
    GuestClientError::Protocol { what }
}

fn misplaced(kind: FrameType) -> GuestClientError {
    GuestClientError::Protocol {
        what: format!("unexpected {kind:?} frame"),
    }
}
