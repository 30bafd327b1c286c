//! The execution that a driver holds: taken, let go, ended by itself.

use super::super::admission::Reservation;
use super::super::error::MachineError;
use super::super::gate::Epoch;
use super::super::hypervisor::{Execution, ImageState};
use super::super::state::{Event, State};
use super::{ADOPTION_PATIENCE, Driver};
use std::sync::Arc;
use torpor_api::ErrorCode;
use torpor_api::vmm::ExitReason;

impl Driver {
    /// Take over an execution of a torpord before.
    pub(super) async fn adopt(&mut self, execution: Arc<dyn Execution>) {
        if let Ok(Ok(status)) = tokio::time::timeout(ADOPTION_PATIENCE, execution.status()).await {
            self.persisted = status.persisted;
            let persisted = status.persisted.map_or(0, |stats| stats.generation);
            self.image_floor = self.image_floor.max(persisted);
        }
        let memory = self.shared.memory.take(self.row.spec.mem_mib);
        self.hold(execution, memory);
    }

    /// Take an execution as the machine's live one.
    pub(super) fn hold(&mut self, execution: Arc<dyn Execution>, memory: Reservation) {
        self.exit = Some(execution.exited());
        self.epoch = Some(Epoch::of(execution));
        self.memory = Some(memory);
    }

    /// Let go of the live execution, whose VMM is gone.
    pub(super) fn let_go(&mut self) {
        self.gate.shut();
        self.exit = None;
        self.memory = None;
        if let Some(epoch) = self.epoch.take() {
            epoch.over.cancel();
        }
    }

    /// Let go of an execution whose memory nothing will restore: open connections end with it.
    pub(super) fn lose(&mut self) {
        self.let_go();
        self.lose_lines();
    }

    /// End the connections that clients keep open to the machine.
    pub(super) fn lose_lines(&self) {
        self.shared.lines.lose(&self.id);
        self.shared.hypervisor.unpark(&self.id);
    }

    /// The VMM ended without being asked to.
    pub(super) async fn ended(&mut self, reason: ExitReason) {
        self.exit = None;
        if matches!(self.state, State::Evicting | State::Deleting) {
            return;
        }
        tracing::info!(machine_id = %self.id, ?reason, "execution ended");
        self.put_aside_commit();
        if let Some(epoch) = self.epoch.clone() {
            epoch.execution.quit().await;
        }
        let memory = self.memory.take();
        self.lose();
        let event = self.judge(reason).await;
        // What it is about to use again is not up to others meanwhile.
        self.memory = memory.filter(|_| event == Event::Rebooted);
        self.apply(event).await;
    }

    /// What the end of a VMM means.
    pub(super) async fn judge(&mut self, reason: ExitReason) -> Event {
        match reason {
            ExitReason::Shutdown => Event::ShutDown,
            ExitReason::Reboot => Event::Rebooted,
            ExitReason::Memory { message } => {
                self.fail(MachineError::new(ErrorCode::ImageCorrupt, message));
                Event::LostImageGone
            }
            ExitReason::Failed { message } => {
                let image = self.shared.hypervisor.inspect_image(&self.id).await;
                let just_persisted = self.persisted.map(|stats| stats.generation);
                match image {
                    ImageState::Valid { generation } if generation >= self.row.image_generation => {
                        // The pause was as good as done: nothing is lost, and nothing failed.
                        if self.state != State::Durable || just_persisted != Some(generation) {
                            self.fail(MachineError::new(ErrorCode::Internal, message));
                        }
                        self.image_floor = self.image_floor.max(generation);
                        self.image_found = generation;
                        Event::LostImageKept
                    }
                    ImageState::Valid { .. }
                    | ImageState::None
                    | ImageState::Stale { .. }
                    | ImageState::Corrupt { .. } => {
                        self.fail(MachineError::new(ErrorCode::Internal, message));
                        Event::LostImageGone
                    }
                }
            }
        }
    }

    pub(super) fn fail(&mut self, error: MachineError) {
        tracing::error!(machine_id = %self.id, code = error.code.as_str(), error = %error, "operation failed");
        self.failure = Some(error);
    }
}
