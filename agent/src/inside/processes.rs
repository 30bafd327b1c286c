//! Commands and processes of a machine: run to their end, left in the background, listed, read, signalled.
//!
//! Every process is kept by the guest (see [`torpor_api::guest::ExecSpec::keep`]), with the end of its output and
//! its exit code, also over pauses; after a reboot of the guest nothing is known of them.

use super::session::SessionEvent;
use super::{About, Inside, failed};
use crate::guest_client::GuestClientError;
use crate::guest_client::channel::last_frame;
use crate::machine::error::MachineError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::time::Duration;
use torpor_api::ErrorCode;
use torpor_api::guest::{
    AttachSpec, Attached, ExecSpec, FrameType, GuestRequest, GuestResponse, ProcessEntry, ProcessOrder,
    WindowSize,
};
use torpor_api::http::{ExecRequest, ExecResult};
use torpor_api::limits::MAX_EXEC_OUTPUT;

/// Time limit of a command that names none.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of standard input in one request to the guest.
const INPUT_CHUNK_BYTES: usize = 256 << 10;
/// The signal that nobody can refuse.
pub const SIGKILL: i32 = 9;

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Over the machine's own environment.
    pub env: BTreeMap<String, String>,
    /// The machine's own directory if not given.
    pub cwd: Option<String>,
    /// `root` if not given.
    pub user: Option<String>,
    /// Take standard input, which is empty otherwise.
    pub stdin: bool,
    /// Run under a terminal.
    pub tty: Option<WindowSize>,
    /// Kill the group after so long; never if not given.
    pub timeout: Option<Duration>,
    /// That somebody waits for it is no activity, as it is not with a terminal.
    pub idle: bool,
}

impl Command {
    /// A program with its arguments.
    #[must_use]
    pub fn argv(argv: Vec<String>) -> Self {
        Self {
            argv,
            ..Self::default()
        }
    }

    /// A command line for `/bin/sh -c`.
    #[must_use]
    pub fn shell(line: &str) -> Self {
        Self::argv(["/bin/sh", "-c", line].map(str::to_owned).to_vec())
    }
}

impl From<ExecRequest> for Command {
    /// Without its standard input. A time limit of zero is none.
    fn from(request: ExecRequest) -> Self {
        let mut command = match request.shell {
            Some(line) => Self::shell(&line),
            None => Self::argv(request.argv),
        };
        command.env = request.env;
        command.cwd = request.cwd;
        command.user = request.user;
        command.timeout = match request.timeout_ms {
            Some(0) => None,
            Some(ms) => Some(Duration::from_millis(ms)),
            None => Some(DEFAULT_TIMEOUT),
        };
        command
    }
}

/// What a command did, run to its end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunOutput {
    /// PID in the guest.
    pub pid: u32,
    /// Exit code, or 128 + signal.
    pub code: i32,
    /// It was killed because its time was up.
    pub timed_out: bool,
    /// Standard output, at most [`MAX_EXEC_OUTPUT`] bytes.
    pub stdout: Vec<u8>,
    /// Standard error, likewise.
    pub stderr: Vec<u8>,
    /// Output past the limit was dropped.
    pub truncated: bool,
}

/// What is kept of a process's output.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProcessLogs {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Both, in the order in which they were written.
    pub output: Vec<u8>,
    /// Offset of the first byte of `output`, counted from the process's start.
    pub begin: u64,
    /// Offset after the last; ask from here to get what comes next.
    pub end: u64,
    /// Exit code, once the process has ended and everything it wrote is here.
    pub exit_code: Option<i32>,
    /// It was killed because its time was up.
    pub timed_out: bool,
}

impl Inside {
    /// Run a command to its end, over pauses if need be; `stdin` is fed and closed if given. Dropping the future
    /// kills the command.
    ///
    /// # Errors
    /// The wake's, `exec_failed`, or `guest_unreachable`. A command that ran out of time is no error.
    pub async fn run(&self, mut command: Command, stdin: Option<Bytes>) -> Result<RunOutput, MachineError> {
        command.stdin = stdin.is_some();
        let mut session = self.open(command).await?;
        let mut killer = KillOnDrop(Some((self.clone(), session.pid)));
        let feed = async {
            if let Some(bytes) = stdin {
                session.input.write(bytes).await;
                session.input.close().await;
            }
            // The handle is kept, so that the session does not take its loss for anything.
            std::future::pending::<()>().await;
        };
        let mut output = RunOutput {
            pid: session.pid,
            ..RunOutput::default()
        };
        let collect = async {
            while let Some(event) = session.events.next().await {
                match event? {
                    SessionEvent::Stdout(bytes) => output.truncated |= append(&mut output.stdout, &bytes),
                    SessionEvent::Stderr(bytes) => output.truncated |= append(&mut output.stderr, &bytes),
                    SessionEvent::Lost(_) => output.truncated = true,
                    SessionEvent::Ended { code, timed_out } => {
                        (output.code, output.timed_out) = (code, timed_out);
                        return Ok(output);
                    }
                }
            }
            Err(MachineError::new(
                ErrorCode::GuestUnreachable,
                "the session ended without the command",
            ))
        };
        let outcome = tokio::select! {
            outcome = collect => outcome,
            () = feed => Err(MachineError::new(ErrorCode::Internal, "the input outlasted the command")),
        };
        // An error of the session may leave the command running.
        if outcome.is_ok() {
            killer.0 = None;
        }
        outcome
    }

    /// Start a process in the background: its PID.
    ///
    /// # Errors
    /// The wake's, `exec_failed`, or `guest_unreachable`.
    pub async fn start(&self, command: Command) -> Result<u32, MachineError> {
        let mut spec = self.spec(command).await?;
        // Nobody waits for it, so nobody's patience ends.
        spec.timeout_ms = None;
        spec.background = true;
        let presence = self.presence("exec").await?;
        let start = async {
            let mut channel = presence.guest.exec(spec).await?;
            loop {
                let frame = channel.receiver.next().await?;
                if frame.kind != FrameType::Started {
                    return match last_frame(&frame)? {
                        GuestResponse::Exited { pid, .. } => Ok(pid),
                        other => Err(unexpected(&other)),
                    };
                }
            }
        };
        presence
            .during(async { start.await.map_err(failed(About::Exec)) })
            .await
    }

    /// A native exec: to its end, or in the background.
    ///
    /// # Errors
    /// As of [`Inside::run`], and `exec_timeout`.
    pub async fn exec(&self, mut request: ExecRequest) -> Result<ExecResult, MachineError> {
        let stdin = request.stdin.take().map(Bytes::from);
        let background = request.background;
        let mut command = Command::from(request);
        if background {
            command.stdin = stdin.is_some();
            let pid = self.start(command).await?;
            if let Some(bytes) = stdin {
                self.write_stdin(pid, &bytes, true).await?;
            }
            return Ok(ExecResult {
                pid,
                exit_code: None,
                stdout: String::new(),
                stderr: String::new(),
                truncated: false,
            });
        }
        let output = self.run(command, stdin).await?;
        if output.timed_out {
            let message = format!("process {} ran out of time and was killed", output.pid);
            return Err(MachineError::new(ErrorCode::ExecTimeout, message));
        }
        Ok(ExecResult {
            pid: output.pid,
            exit_code: Some(output.code),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            truncated: output.truncated,
        })
    }

    /// The processes that commands started: those that run, and the last ones that ended. Does not wake.
    ///
    /// # Errors
    /// `machine_not_ready` if the machine does not run, or `guest_unreachable`.
    pub async fn processes(&self) -> Result<Vec<ProcessEntry>, MachineError> {
        let presence = self.presence_if_awake().await?;
        let asked = async { presence.guest.processes().await.map_err(failed(About::Process)) };
        presence.during(asked).await
    }

    /// One of them: whichever had the PID last. Does not wake.
    ///
    /// # Errors
    /// As of [`Inside::processes`], and `process_not_found`.
    pub async fn process(&self, pid: u32) -> Result<ProcessEntry, MachineError> {
        let processes = self.processes().await?;
        let found = processes.into_iter().rev().find(|process| process.pid == pid);
        found.ok_or_else(|| no_process(pid))
    }

    /// What is kept of a process's output, from an offset on; wakes.
    ///
    /// # Errors
    /// The wake's, `process_not_found`, or `guest_unreachable`.
    pub async fn logs(&self, pid: u32, after: u64) -> Result<ProcessLogs, MachineError> {
        let presence = self.presence("logs").await?;
        let spec = AttachSpec {
            pid,
            offset: after,
            ..AttachSpec::default()
        };
        let read = async {
            let mut channel = presence.guest.attach(spec).await?;
            let mut logs = ProcessLogs::default();
            loop {
                let frame = channel.receiver.next().await?;
                match frame.kind {
                    FrameType::Attached => {
                        let attached = serde_json::from_slice::<Attached>(&frame.payload);
                        logs.begin = attached.map_err(|_| unexpected(&GuestResponse::Done))?.offset;
                    }
                    FrameType::Stdout => logs.stdout.extend_from_slice(&frame.payload),
                    FrameType::Stderr => logs.stderr.extend_from_slice(&frame.payload),
                    _ => match last_frame(&frame)? {
                        GuestResponse::Exited { code, timed_out, .. } => {
                            logs.end = logs.begin + logs.output.len() as u64;
                            (logs.exit_code, logs.timed_out) = (code, timed_out);
                            return Ok(logs);
                        }
                        other => return Err(unexpected(&other)),
                    },
                }
                if matches!(frame.kind, FrameType::Stdout | FrameType::Stderr) {
                    logs.output.extend_from_slice(&frame.payload);
                    if logs.output.len() > MAX_EXEC_OUTPUT {
                        return Err(unexpected(&GuestResponse::Done));
                    }
                }
            }
        };
        presence
            .during(async { read.await.map_err(failed(About::Process)) })
            .await
    }

    /// Give bytes to a process's standard input, and end it if `close`; wakes.
    ///
    /// # Errors
    /// The wake's, `process_not_found`, `invalid_request` if it takes no input or has ended.
    pub async fn write_stdin(&self, pid: u32, bytes: &[u8], close: bool) -> Result<(), MachineError> {
        // Nothing is an input, too: whether there is such a process is the question then.
        let nothing = bytes.is_empty() && !close;
        for chunk in bytes.chunks(INPUT_CHUNK_BYTES).chain(nothing.then_some(bytes)) {
            self.tell(pid, ProcessOrder::Input(STANDARD.encode(chunk)))
                .await?;
        }
        if close {
            self.tell(pid, ProcessOrder::InputEnd).await?;
        }
        Ok(())
    }

    /// Change the size of a process's terminal; wakes.
    ///
    /// # Errors
    /// The wake's, `process_not_found`, `invalid_request` if it has no terminal or has ended.
    pub async fn resize(&self, pid: u32, size: WindowSize) -> Result<(), MachineError> {
        self.tell(pid, ProcessOrder::Resize(size)).await
    }

    async fn tell(&self, pid: u32, what: ProcessOrder) -> Result<(), MachineError> {
        let presence = self.presence("input").await?;
        let request = GuestRequest::Tell { pid, what };
        let told = async {
            let told = presence.guest.done("tell a process", &request).await;
            told.map_err(failed(About::Process))
        };
        presence.during(told).await
    }

    /// Signal the whole group of a process, also of one that ended and left others behind; wakes.
    ///
    /// # Errors
    /// The wake's, `process_not_found`, or `invalid_request`.
    pub async fn kill(&self, pid: u32, signal: i32) -> Result<(), MachineError> {
        let presence = self.presence("kill").await?;
        let killed = async {
            let killed = presence.guest.signal_group(pid, signal).await;
            killed.map_err(failed(About::Process))
        };
        presence.during(killed).await
    }

    /// The request to the guest, with the machine's own environment and directory.
    pub(super) async fn spec(&self, command: Command) -> Result<ExecSpec, MachineError> {
        let request = ExecRequest {
            env: command.env,
            cwd: command.cwd,
            ..ExecRequest::default()
        };
        let request = self.fleet.with_defaults(&self.machine, request).await?;
        let timeout_ms = command
            .timeout
            .map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
        Ok(ExecSpec {
            argv: command.argv,
            env: request.env,
            cwd: request.cwd,
            user: command.user,
            stdin: command.stdin || command.tty.is_some(),
            tty: command.tty,
            timeout_ms,
            keep: false,
            background: false,
        })
    }
}

fn no_process(pid: u32) -> MachineError {
    let message = format!("no process with PID {pid} was started by an exec");
    MachineError::new(ErrorCode::ProcessNotFound, message)
}

fn unexpected(response: &GuestResponse) -> GuestClientError {
    crate::guest_client::unexpected("exec", response)
}

/// Append what fits; whether something was dropped.
fn append(kept: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let fits = bytes.len().min(MAX_EXEC_OUTPUT.saturating_sub(kept.len()));
    kept.extend_from_slice(bytes.get(..fits).unwrap_or_default());
    fits < bytes.len()
}

/// A command whose caller goes away has nobody left to run for.
struct KillOnDrop(Option<(Inside, u32)>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some((inside, pid)) = self.0.take() {
            tokio::spawn(async move {
                if let Ok(presence) = inside.presence_if_awake().await
                    && let Err(error) = presence.guest.signal_group(pid, SIGKILL).await
                {
                    tracing::debug!(machine_id = %inside.machine, pid, %error, "command not killed");
                }
            });
        }
    }
}
