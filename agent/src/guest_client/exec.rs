//! Processes in the guest: run to completion with bounded output, in the background, or as a session whose
//! two halves a terminal drives.

use std::time::Duration;

use bytes::Bytes;
use torpor_api::guest::{ExecSpec, FrameType, GuestRequest, GuestResponse, WindowSize};
use torpor_api::limits::MAX_EXEC_OUTPUT;

use super::channel::{Channel, FrameReceiver, FrameSender, last_frame};
use super::{ANSWER_DEADLINE, GuestClient, GuestClientError, bounded, misplaced, unexpected};

/// How long a guest may take to report the end of a process that it was to kill at its timeout.
const TIMEOUT_GRACE: Duration = Duration::from_secs(15);

/// What a process did, run to completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// PID in the guest.
    pub pid: u32,
    /// Exit code, or 128 + signal; none for a background process.
    pub code: Option<i32>,
    /// It was killed because its time was up.
    pub timed_out: bool,
    /// Standard output, at most [`MAX_EXEC_OUTPUT`] bytes.
    pub stdout: Vec<u8>,
    /// Standard error, likewise.
    pub stderr: Vec<u8>,
    /// Output past the limit was dropped.
    pub truncated: bool,
}

/// What comes from a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It runs.
    Started {
        /// PID in the guest.
        pid: u32,
    },
    /// Standard output.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// It ended; the last event.
    Exited {
        /// PID in the guest.
        pid: u32,
        /// Exit code, or 128 + signal.
        code: Option<i32>,
        /// It was killed because its time was up.
        timed_out: bool,
    },
}

/// Events of a running process.
pub struct ExecEvents(FrameReceiver);

/// Input of a running process. Dropping it and the events kills the process's group.
pub struct ExecInput(FrameSender);

impl GuestClient {
    /// Start a process and drive it as it runs.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn exec_session(&self, spec: ExecSpec) -> Result<(ExecInput, ExecEvents), GuestClientError> {
        let open = async {
            let mut channel = Channel::open(&self.socket).await?;
            channel.send_request(&GuestRequest::Exec(spec)).await?;
            Ok(channel)
        };
        let channel = bounded("exec", ANSWER_DEADLINE, open).await?;
        Ok((ExecInput(channel.sender), ExecEvents(channel.receiver)))
    }

    /// Run a process to its end, or start it if `spec.background`. `stdin` is fed and closed if given.
    ///
    /// # Errors
    /// See [`GuestClientError`]. A process that ran out of time is no error; see [`ExecOutput::timed_out`].
    pub async fn exec(
        &self,
        mut spec: ExecSpec,
        stdin: Option<Bytes>,
    ) -> Result<ExecOutput, GuestClientError> {
        spec.stdin = stdin.is_some();
        let limit = match spec.timeout_ms {
            Some(timeout_ms) => Some(Duration::from_millis(timeout_ms).saturating_add(TIMEOUT_GRACE)),
            None if spec.background => Some(ANSWER_DEADLINE),
            None => None,
        };
        let run = self.run_to_end(spec, stdin);
        match limit {
            Some(limit) => bounded("exec", limit, run).await,
            None => run.await,
        }
    }

    async fn run_to_end(&self, spec: ExecSpec, stdin: Option<Bytes>) -> Result<ExecOutput, GuestClientError> {
        let (mut input, mut events) = self.exec_session(spec).await?;
        // Together, because a process may answer before it has read all that it is given.
        let feed = async {
            if let Some(bytes) = stdin {
                input.write(&bytes).await?;
                input.close().await?;
            }
            Ok(())
        };
        let (fed, output) = tokio::join!(feed, collect(&mut events));
        let output = output?;
        match fed {
            // A process may end without reading its input.
            Ok(()) | Err(GuestClientError::Closed) => Ok(output),
            Err(error) => Err(error),
        }
    }
}

async fn collect(events: &mut ExecEvents) -> Result<ExecOutput, GuestClientError> {
    let mut output = ExecOutput {
        pid: 0,
        code: None,
        timed_out: false,
        stdout: Vec::new(),
        stderr: Vec::new(),
        truncated: false,
    };
    loop {
        match events.next().await? {
            ExecEvent::Started { pid } => output.pid = pid,
            ExecEvent::Stdout(bytes) => output.truncated |= append(&mut output.stdout, &bytes),
            ExecEvent::Stderr(bytes) => output.truncated |= append(&mut output.stderr, &bytes),
            ExecEvent::Exited { pid, code, timed_out } => {
                (output.pid, output.code, output.timed_out) = (pid, code, timed_out);
                return Ok(output);
            }
        }
    }
}

/// Append what fits; whether something was dropped.
fn append(kept: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let fits = bytes.len().min(MAX_EXEC_OUTPUT - kept.len());
    kept.extend_from_slice(&bytes[..fits]);
    fits < bytes.len()
}

impl ExecEvents {
    /// The next event; [`ExecEvent::Exited`] is the last one.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn next(&mut self) -> Result<ExecEvent, GuestClientError> {
        let frame = self.0.next().await?;
        match frame.kind {
            FrameType::Stdout => Ok(ExecEvent::Stdout(frame.payload)),
            FrameType::Stderr => Ok(ExecEvent::Stderr(frame.payload)),
            FrameType::Started => match <[u8; 4]>::try_from(&frame.payload[..]) {
                Ok(pid) => Ok(ExecEvent::Started {
                    pid: u32::from_le_bytes(pid),
                }),
                Err(_) => Err(misplaced(frame.kind)),
            },
            _ => match last_frame(&frame)? {
                GuestResponse::Exited { pid, code, timed_out } => {
                    Ok(ExecEvent::Exited { pid, code, timed_out })
                }
                other => Err(unexpected("exec", &other)),
            },
        }
    }
}

impl ExecInput {
    /// Bytes for standard input.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestClientError> {
        self.0.send_all(FrameType::Stdin, bytes).await
    }

    /// End standard input.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn close(&mut self) -> Result<(), GuestClientError> {
        self.0.send(FrameType::StdinEof, &[]).await
    }

    /// The terminal has another size.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn resize(&mut self, size: WindowSize) -> Result<(), GuestClientError> {
        let json = serde_json::to_vec(&size).map_err(|error| GuestClientError::Protocol {
            what: format!("window size has no JSON: {error}"),
        })?;
        self.0.send(FrameType::Resize, &json).await
    }

    /// Signal the process's group.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn signal(&mut self, signal: u32) -> Result<(), GuestClientError> {
        self.0.send(FrameType::Signal, &signal.to_le_bytes()).await
    }
}
