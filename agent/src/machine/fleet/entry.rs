//! Who comes in: payload, connections, whether somebody may, and the SSH gateway's door.

use super::super::error::MachineError;
use super::super::gate::Pass;
use super::super::lines::OpenLine;
use super::super::state::State;
use super::{Fleet, WakeSource};
use crate::ssh::Door;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use torpor_api::activity::ActivitySource;
use torpor_api::{ErrorCode, MachineId};

impl Fleet {
    /// The way into a machine that runs, for payload of the proxy.
    #[must_use]
    pub fn enter(&self, id: &MachineId) -> Option<Pass> {
        let gate = self.shared.registry.find(id)?.gate;
        gate.enter(ActivitySource::Proxy, self.now_unix_ms())
    }

    /// Likewise, without counting as activity.
    #[must_use]
    pub fn enter_quietly(&self, id: &MachineId) -> Option<Pass> {
        self.shared.registry.find(id)?.gate.enter_quietly()
    }

    /// Enter a connection that may outlast pauses of the machine.
    #[must_use]
    pub fn open_line(&self, id: &MachineId, socket: OwnedFd) -> OpenLine {
        let (hypervisor, machine) = (Arc::clone(&self.shared.hypervisor), id.clone());
        self.shared
            .lines
            .open(id, socket, move || hypervisor.unpark(&machine))
    }

    /// Whether this traffic may reach the machine as it is now: awake, or with its wake switch on. Wakes nothing.
    ///
    /// # Errors
    /// `machine_paused_auto_resume_disabled`, or there is no such machine.
    pub async fn check_entry(&self, id: &MachineId, source: WakeSource) -> Result<(), MachineError> {
        let (row, live) = self.look(id).await?;
        let state = live
            .and_then(|live| live.state)
            .unwrap_or_else(|| row.committed.at_rest());
        if is_asleep(state) && !source.allowed_by(row.wake) {
            let message = format!(
                "machine {id} is asleep, and its wake switch for {} is off",
                source.actor()
            );
            return Err(MachineError::new(ErrorCode::AutoResumeDisabled, message));
        }
        Ok(())
    }

    /// Write down what happened to a machine; a failure to do so is logged and nothing else.
    pub async fn record(
        &self,
        id: &MachineId,
        kind: &'static str,
        actor: &'static str,
        detail: serde_json::Value,
    ) {
        let event = self.event(id, kind, actor, detail);
        if let Err(error) = self.store().append_event(event).await {
            tracing::warn!(machine_id = %id, %error, kind, "event not recorded");
        }
    }

    /// Say where the SSH gateway is. Only the first one counts.
    pub fn attach_ssh(&self, door: Door) {
        let _ = self.shared.ssh.set(Arc::new(door));
    }

    /// The SSH gateway, if there is one.
    #[must_use]
    pub fn ssh_door(&self) -> Option<&Arc<Door>> {
        self.shared.ssh.get()
    }
}

/// Whether a request would have to wake a machine in this state.
pub(super) fn is_asleep(state: State) -> bool {
    !matches!(
        state,
        State::Running | State::Capturing | State::Creating | State::Starting | State::Waking
    )
}
