//! The one operation that a driver has under way, and what its end means.

use super::super::admission::Reservation;
use super::super::error::{MachineError, chain};
use super::super::hypervisor::{Execution, FreezeTrace, HypervisorError, Ran, WakeStages, WokenFrom};
use super::super::state::{Effect, Event};
use super::{Driver, Staged};
use crate::store::{MachineRow, StoreError};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use torpor_api::vmm::{ExitReason, PersistStats};
use torpor_api::{ErrorCode, ExecutionId};

/// Something that takes time.
pub(super) struct Operation {
    pub(super) effect: Effect,
    pub(super) future: Pin<Box<dyn Future<Output = Outcome> + Send>>,
}

impl Operation {
    pub(super) fn new(effect: Effect, future: impl Future<Output = Outcome> + Send + 'static) -> Self {
        Self {
            effect,
            future: Box::pin(future),
        }
    }
}

/// An execution that came up, with the host memory that is reserved for it.
pub(super) struct Up {
    pub(super) execution: Arc<dyn Execution>,
    pub(super) memory: Reservation,
    /// Generation of the image that it came from; 0 if it booted.
    pub(super) image_generation: u64,
    pub(super) report: WakeReport,
}

/// What came of an operation.
pub(super) enum Outcome {
    Booted(Result<Up, MachineError>),
    Restored(Result<Up, HypervisorError>),
    Frozen(Result<FreezeTrace, HypervisorError>),
    Persisted(Result<PersistStats, HypervisorError>),
    PauseCommitted(Box<Result<MachineRow, StoreError>>),
    Ran(Result<Ran, HypervisorError>),
    /// What came of the snapshot, and whether the guest runs again.
    Captured(Result<Staged, MachineError>, Result<Ran, HypervisorError>),
    Copied(Result<Staged, MachineError>),
    Evicted,
    Deleted(Result<(), MachineError>),
}

/// How a machine got running, for the caller who waited and for the events table.
#[derive(Debug, Clone)]
pub struct WakeReport {
    /// The execution.
    pub execution: ExecutionId,
    /// From the first caller's wish to the operation's beginning.
    pub decided: Duration,
    /// Waiting for host memory.
    pub admitted: Duration,
    /// Stages of a restore; absent for a boot and for a pause that was undone.
    pub stages: Option<WakeStages>,
    /// From the operation's beginning to the guest running.
    pub running: Duration,
}

impl WakeReport {
    /// Its parts with their own durations, in order.
    #[must_use]
    pub fn stages(&self) -> Vec<(&'static str, Duration)> {
        let mut stages = vec![("decided", self.decided), ("admitted", self.admitted)];
        if let Some(restore) = &self.stages {
            // Those of the VMM are points in time since its request.
            let us = |from: u64, to: u64| Duration::from_micros(to.saturating_sub(from));
            let vmm = &restore.vmm;
            stages.extend([
                ("vmm_ready", us(0, restore.vmm_ready_us)),
                ("state_loaded", us(0, vmm.state_loaded_us)),
                ("memory_ready", us(vmm.state_loaded_us, vmm.memory_ready_us)),
                ("vcpus_running", us(vmm.memory_ready_us, vmm.running_us)),
                ("resynced", us(restore.restored_us, restore.resynced_us)),
            ]);
        }
        stages
    }

    /// What was there of the machine; nothing if it booted or its pause was undone.
    #[must_use]
    pub fn woken_from(&self) -> Option<WokenFrom> {
        self.stages.as_ref().map(|stages| stages.from)
    }

    /// As it goes to the events table, in microseconds.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let mut json = serde_json::json!({
            "decided_us": us(self.decided),
            "admitted_us": us(self.admitted),
            "running_us": us(self.running),
        });
        if let Some(stages) = &self.stages {
            json["vmm_ready_us"] = stages.vmm_ready_us.into();
            json["restored_us"] = stages.restored_us.into();
            json["resynced_us"] = stages.resynced_us.into();
            json["from"] = stages.from.as_str().into();
            json["vmm"] = serde_json::json!(stages.vmm);
        }
        json
    }
}

impl Driver {
    /// The event that an outcome is, with what it brought kept.
    pub(super) async fn conclude(&mut self, outcome: Outcome) -> Event {
        match outcome {
            Outcome::Booted(Ok(up)) => self.came_up(up, Event::Booted),
            Outcome::Booted(Err(error)) => {
                self.fail(error);
                Event::BootFailed
            }
            Outcome::Restored(Ok(up)) => self.came_up(up, Event::Restored),
            Outcome::Restored(Err(error)) => self.restore_failed(error).await,
            Outcome::Frozen(Ok(trace)) => {
                self.freeze = trace;
                Event::Frozen
            }
            Outcome::Frozen(Err(error)) => self.pause_failed(error, Event::FreezeFailed),
            Outcome::Persisted(Ok(stats)) => {
                self.persisted = Some(stats);
                Event::Persisted
            }
            Outcome::Persisted(Err(error)) => self.pause_failed(error, Event::PersistFailed),
            Outcome::PauseCommitted(committed) => match *committed {
                Ok(row) => {
                    self.row = row;
                    self.shared
                        .telemetry
                        .paused(&self.freeze, self.persisted.as_ref());
                    self.shared.retention_changed.notify_one();
                    self.remember(None);
                    Event::PauseCommitted
                }
                Err(error) => {
                    let code = match error.code() {
                        code @ (ErrorCode::DiskFull | ErrorCode::TransitionInProgress) => code,
                        _ => ErrorCode::PauseFailed,
                    };
                    self.shared.telemetry.pause_failed(code);
                    self.fail(MachineError::new(code, chain(&error)));
                    Event::PauseNotCommitted
                }
            },
            Outcome::Ran(Ok(ran)) => {
                self.report = self.epoch.as_ref().map(|epoch| {
                    Arc::new(WakeReport {
                        execution: epoch.execution.id().clone(),
                        decided: Duration::ZERO,
                        admitted: Duration::ZERO,
                        stages: None,
                        running: Duration::from_micros(ran.run_us),
                    })
                });
                Event::Ran
            }
            Outcome::Ran(Err(error)) => self.run_failed(&error).await,
            Outcome::Captured(staged, ran) => self.captured(staged, ran).await,
            Outcome::Copied(staged) => self.copied(staged),
            Outcome::Evicted => {
                self.let_go();
                Event::Evicted
            }
            Outcome::Deleted(Ok(())) => {
                self.lose();
                Event::Deleted
            }
            Outcome::Deleted(Err(error)) => {
                self.fail(error);
                Event::DeleteFailed
            }
        }
    }

    fn pause_failed(&mut self, error: HypervisorError, event: Event) -> Event {
        self.shared.telemetry.pause_failed(error.code);
        self.fail(error.into());
        event
    }

    fn came_up(&mut self, up: Up, event: Event) -> Event {
        self.image_floor = self.image_floor.max(up.image_generation);
        self.hold(up.execution, up.memory);
        self.report = Some(Arc::new(up.report));
        event
    }

    /// A refused image may also be one that the disk has left behind: that memory is lost, not to be tried again.
    async fn restore_failed(&mut self, error: HypervisorError) -> Event {
        use super::super::hypervisor::ImageState;
        self.shared.telemetry.wake_failed(error.code);
        // Any other attempt has taken the network that was kept, and has given it up.
        if error.code != ErrorCode::CapacityExceeded {
            self.lose_lines();
        }
        if !error.refuses_image() {
            self.fail(error.into());
            self.record_failure("machine.resume_failed").await;
            return Event::RestoreFailed;
        }
        self.fail(error.into());
        match self.shared.hypervisor.inspect_image(&self.id).await {
            ImageState::Stale { .. } => Event::LostImageGone,
            ImageState::None | ImageState::Valid { .. } | ImageState::Corrupt { .. } => Event::RestoreRefused,
        }
    }

    /// A VMM that cannot be set free is given up; its end decides what is left.
    pub(super) async fn run_failed(&mut self, error: &HypervisorError) -> Event {
        let told = self.exit.as_ref().and_then(|exit| exit.borrow().clone());
        if let Some(epoch) = self.epoch.clone() {
            epoch.execution.quit().await;
        }
        self.lose();
        let reason = told.unwrap_or_else(|| ExitReason::Failed {
            message: chain(error),
        });
        self.judge(reason).await
    }
}
