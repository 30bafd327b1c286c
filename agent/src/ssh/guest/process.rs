//! A session of [`crate::inside`] in the gateway's words.

use crate::inside::session::{Session, SessionEvent, SessionEvents, SessionInput};
use crate::machine::fleet::Fleet;
use crate::ssh::refusal;
use async_trait::async_trait;
use bytes::Bytes;
use torpor_api::guest::WindowSize;
use torpor_api::{ErrorCode, MachineId};
use torpor_ssh::{Process, ProcessEvent, ProcessInput, ProcessOutput, Refusal};

/// The signal of a line that went dead.
const SIGHUP: i32 = 1;

/// Tells a process that its client is gone, once its machine is awake: a client that leaves wakes nobody.
pub(super) struct Hangup(Option<(Fleet, MachineId, u32, u64)>);

impl Hangup {
    pub(super) fn new(fleet: &Fleet, machine: &MachineId, session: &Session) -> Self {
        Self(Some((
            fleet.clone(),
            machine.clone(),
            session.pid,
            session.serial,
        )))
    }

    /// The process has ended.
    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for Hangup {
    fn drop(&mut self) {
        if let Some((fleet, machine, pid, serial)) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(hang_up(fleet, machine, pid, serial));
        }
    }
}

async fn hang_up(fleet: Fleet, machine: MachineId, pid: u32, serial: u64) {
    // A machine that is deleted meanwhile has no process.
    let Ok(presence) = fleet.presence_when_awake(&machine).await else {
        return;
    };
    let told = async {
        let processes = presence.guest.processes().await?;
        let is_there = processes
            .iter()
            .any(|process| (process.pid, process.serial, process.running) == (pid, serial, true));
        if is_there {
            presence.guest.signal_group(pid, SIGHUP).await?;
        }
        Ok::<(), crate::guest_client::GuestClientError>(())
    };
    if let Err(error) = told.await {
        tracing::debug!(machine_id = %machine, pid, %error, "process not told that its client is gone");
    }
}

pub(super) fn halves(session: Session, hangup: Hangup) -> Process {
    Process {
        input: Box::new(Input(session.input)),
        output: Box::new(Output {
            events: session.events,
            hangup,
        }),
    }
}

struct Input(SessionInput);

#[async_trait]
impl ProcessInput for Input {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Refusal> {
        self.0.write(bytes).await;
        Ok(())
    }

    async fn close(&mut self) -> Result<(), Refusal> {
        self.0.close().await;
        Ok(())
    }

    async fn resize(&mut self, size: WindowSize) -> Result<(), Refusal> {
        self.0.resize(size).await;
        Ok(())
    }

    async fn signal(&mut self, signal: u32) -> Result<(), Refusal> {
        self.0.signal(signal).await;
        Ok(())
    }
}

struct Output {
    events: SessionEvents,
    hangup: Hangup,
}

#[async_trait]
impl ProcessOutput for Output {
    async fn next(&mut self) -> Result<ProcessEvent, Refusal> {
        let event = match self.events.next().await {
            Some(event) => event.map_err(refusal)?,
            None => return Err(Refusal::new(ErrorCode::GuestUnreachable, "the session is over")),
        };
        Ok(match event {
            SessionEvent::Stdout(bytes) => ProcessEvent::Stdout(bytes),
            SessionEvent::Stderr(bytes) => ProcessEvent::Stderr(bytes),
            SessionEvent::Lost(n_bytes) => {
                let note = format!("\r\n[torpor: {n_bytes} bytes of output were lost]\r\n");
                ProcessEvent::Stderr(note.into())
            }
            SessionEvent::Ended { code, .. } => {
                self.hangup.disarm();
                ProcessEvent::Exited {
                    code: u32::try_from(code).unwrap_or(255),
                }
            }
        })
    }
}
