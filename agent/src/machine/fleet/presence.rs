//! The guest of a machine, for whoever works inside it: woken, only if awake, or once it is awake.

use super::super::error::MachineError;
use super::super::gate::{AtWork, Epoch, Gate, Pass};
use super::super::hypervisor::ConnectError;
use super::super::state::Committed;
use super::{Fleet, WakeSource};
use crate::guest_client::GuestClient;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use torpor_api::guest::HoldState;
use torpor_api::{ErrorCode, ExecutionId, MachineId};

/// How long a guest may take to say whether it is held.
const HOLD_PATIENCE: Duration = Duration::from_secs(2);

/// A guest that runs.
pub struct Presence {
    /// Its agent.
    pub guest: GuestClient,
    pass: Pass,
    gate: Arc<Gate>,
}

impl Presence {
    fn of(pass: Pass, gate: Arc<Gate>) -> Self {
        Self {
            guest: pass.epoch().execution.guest(),
            pass,
            gate,
        }
    }

    /// A TCP connection to the guest's own address.
    ///
    /// # Errors
    /// Nothing accepts there, or the guest does not answer.
    pub async fn connect(&self, port: u16) -> Result<TcpStream, ConnectError> {
        self.pass.epoch().execution.connect(port).await
    }

    /// Which execution this is, for a connection that was made in it.
    #[must_use]
    pub fn epoch(&self) -> &Epoch {
        self.pass.epoch()
    }

    /// Cancelled when the execution is over.
    #[must_use]
    pub fn over(&self) -> CancellationToken {
        self.pass.epoch().over.clone()
    }

    /// Count as activity until the value is dropped.
    #[must_use]
    pub fn at_work(&self) -> AtWork {
        self.gate.at_work()
    }

    /// No longer keep a pause waiting; the agent may go away at any time.
    #[must_use]
    pub fn leave(self) -> Arc<Gate> {
        self.gate
    }

    /// The execution in which it is.
    #[must_use]
    pub fn execution(&self) -> &ExecutionId {
        self.pass.epoch().execution.id()
    }

    /// Do something with the guest, unless the execution ends under it.
    ///
    /// # Errors
    /// What `work` meets, or `guest_unreachable`.
    pub async fn during<T>(
        &self,
        work: impl Future<Output = Result<T, MachineError>>,
    ) -> Result<T, MachineError> {
        tokio::select! {
            outcome = work => outcome,
            () = self.pass.epoch().over.cancelled() => {
                let message = "the machine went to sleep or stopped meanwhile";
                Err(MachineError::new(ErrorCode::GuestUnreachable, message))
            }
        }
    }
}

impl Fleet {
    /// The machine's guest, woken if the switch for this source allows it.
    ///
    /// # Errors
    /// As of [`Fleet::wake`].
    pub async fn presence(
        &self,
        id: &MachineId,
        source: WakeSource,
        cause: serde_json::Value,
    ) -> Result<Presence, MachineError> {
        let woken = self.wake(id, source, cause).await?;
        // Whoever holds a pass keeps the driver.
        let handle = self.shared.registry.find(id);
        let handle =
            handle.ok_or_else(|| MachineError::new(ErrorCode::ResumeFailed, "the machine ended at once"))?;
        Ok(Presence::of(woken.pass, handle.gate))
    }

    /// The machine's guest, if it runs.
    ///
    /// # Errors
    /// `machine_not_ready` if it does not.
    pub async fn presence_if_awake(&self, id: &MachineId) -> Result<Presence, MachineError> {
        if let Some(presence) = self.try_presence(id) {
            return Ok(presence);
        }
        let (row, live) = self.look(id).await?;
        let status = super::status_of(&row, live.as_ref());
        let status = serde_json::to_value(status).unwrap_or_default();
        let message = format!(
            "machine {id} is {}, and this does not wake it",
            status.as_str().unwrap_or_default()
        );
        Err(MachineError::new(ErrorCode::MachineNotReady, message))
    }

    /// The machine's guest as soon as it runs, which somebody else sees to.
    ///
    /// # Errors
    /// The machine is deleted, or the store refuses.
    pub async fn presence_when_awake(&self, id: &MachineId) -> Result<Presence, MachineError> {
        loop {
            let dawn = self.shared.dawn.of(id);
            let told = dawn.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            if let Some(presence) = self.try_presence(id) {
                return Ok(presence);
            }
            let (row, _) = self.look(id).await?;
            if row.committed == Committed::Deleting {
                return Err(MachineError::not_found(id));
            }
            told.await;
        }
    }

    /// The hold that code inside has on the machine. A guest that does not run, or does not answer, holds nothing.
    pub async fn hold_of(&self, id: &MachineId) -> Option<HoldState> {
        let inside = self.inside(id.clone(), WakeSource::Api);
        let answer = tokio::time::timeout(HOLD_PATIENCE, inside.hold()).await;
        answer.ok().and_then(Result::ok).flatten()
    }

    /// Does a command run in the machine on somebody's behalf?
    #[must_use]
    pub fn is_at_work(&self, id: &MachineId) -> bool {
        let handle = self.shared.registry.find(id);
        handle.is_some_and(|handle| handle.gate.is_at_work())
    }

    fn try_presence(&self, id: &MachineId) -> Option<Presence> {
        let handle = self.shared.registry.find(id)?;
        let pass = handle.gate.enter_quietly()?;
        Some(Presence::of(pass, handle.gate))
    }
}
