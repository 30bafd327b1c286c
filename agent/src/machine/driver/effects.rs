//! Effects of the transition table as calls.

use super::super::admission::{Patience, Reservation};
use super::super::error::MachineError;
use super::super::fleet::Shared;
use super::super::gate::Epoch;
use super::super::hypervisor::{Execution, HypervisorError, MachineSpec, Ran};
use super::super::state::{Committed, Effect, Event};
use super::first::{self, First};
use super::operation::{Operation, Outcome, Up, WakeReport};
use super::{Driver, Need};
use crate::store::NewEvent;
use std::sync::Arc;
use std::time::{Duration, Instant};
use torpor_api::{ErrorCode, ExecutionId};

/// How often a VMM is asked to set its guest free, and how long apart.
const RUN_TRIES: u32 = 3;
const RUN_RETRY: Duration = Duration::from_millis(50);

impl Driver {
    pub(super) async fn perform(&mut self, effect: Effect, event: Option<Event>) {
        match effect {
            Effect::CommitRunning => self.commit_running(event).await,
            Effect::CommitPaused => self.commit_found_image().await,
            Effect::CommitRefused => self.commit_refused().await,
            Effect::CommitStopped => self.commit_stopped(event).await,
            Effect::QuitExecution => {
                if let Some(epoch) = self.epoch.clone() {
                    epoch.execution.quit().await;
                }
                self.lose();
            }
            Effect::Boot => self.begin_boot(event).await,
            Effect::Restore => {
                let order = self.up_order();
                self.begin(effect, restore(Arc::clone(&self.shared), order));
            }
            Effect::Freeze => self.begin_freeze(),
            Effect::Persist => self.begin_persist(),
            Effect::CommitPause => self.begin_commit_pause(),
            Effect::Run => self.begin_run(),
            Effect::Capture => self.begin_capture(),
            Effect::Copy => self.begin_copy(),
            Effect::Evict => self.begin_evict(),
            Effect::Delete => self.begin_delete().await,
        }
    }

    /// Beginning an operation drops the one before, except a commit: that lands all the same.
    pub(super) fn begin(&mut self, effect: Effect, future: impl Future<Output = Outcome> + Send + 'static) {
        self.put_aside_commit();
        self.operation = Some(Operation::new(effect, future));
    }

    pub(super) fn put_aside_commit(&mut self) {
        if let Some(operation) = self.operation.take()
            && operation.effect == Effect::CommitPause
        {
            self.overtaken = Some(operation);
        }
    }

    /// The shape may have been changed while the machine was asleep or off, which no transition tells.
    async fn take_up_shape(&mut self) {
        match self.shared.store.machine(&self.id).await {
            Ok(Some(row)) => self.row.spec = row.spec,
            Ok(None) => {}
            Err(error) => tracing::error!(machine_id = %self.id, %error, "shape not read before a boot"),
        }
    }

    fn up_order(&mut self) -> UpOrder {
        let wait = self.wake.patience.unwrap_or(self.shared.settings.wake_timeout);
        let patience = Patience::of(wait);
        self.patience = Some(patience.clone());
        UpOrder {
            spec: self.row.spec.clone(),
            generation: self.row.image_generation,
            asked: self.wake.asked,
            first_port: self.wake.first_port(),
            first: First::Boot,
            patience,
            memory: self.memory.take(),
        }
    }

    /// The row stops claiming memory before the platform gives it up.
    async fn begin_boot(&mut self, event: Option<Event>) {
        if event == Some(Event::Rebooted) {
            self.wake = super::WakeOrder {
                need: Need::Machine,
                ..super::WakeOrder::by("guest")
            };
        }
        if !matches!(self.row.committed, Committed::Creating | Committed::Stopped) {
            self.commit_before_boot(event).await;
        }
        self.lose_lines();
        self.take_up_shape().await;
        let mut order = self.up_order();
        if self.row.committed == Committed::Creating {
            order.first = std::mem::take(&mut self.first);
        }
        self.begin(Effect::Boot, boot(Arc::clone(&self.shared), order));
    }

    fn why_deleted(&self) -> serde_json::Value {
        let mut detail = serde_json::json!({ "name": self.row.name });
        if self.pause.only_if_expired_at_unix_ms.is_some() {
            detail["retention_seconds"] = self.row.retention_seconds.into();
            detail["last_used_unix_ms"] = self.row.last_used_unix_ms.into();
        }
        detail
    }

    fn begin_freeze(&mut self) {
        let Some(epoch) = self.epoch.clone() else {
            return self.begin(Effect::Freeze, async { Outcome::Frozen(Err(no_execution())) });
        };
        let gate = Arc::clone(&self.gate);
        let grace = self.shared.settings.drain_grace;
        let (shared, id) = (Arc::clone(&self.shared), self.id.clone());
        self.begin(Effect::Freeze, async move {
            // Requests that outlast the grace are cut off by the pause.
            let _ = tokio::time::timeout(grace, gate.drain()).await;
            gate.shut();
            if let Some(lines) = shared.lines.of(&id) {
                lines.settle().await;
            }
            Outcome::Frozen(epoch.execution.freeze().await)
        });
    }

    fn begin_persist(&mut self) {
        self.image_floor += 1;
        let generation = self.image_floor;
        let Some(epoch) = self.epoch.clone() else {
            return self.begin(Effect::Persist, async { Outcome::Persisted(Err(no_execution())) });
        };
        self.begin(Effect::Persist, async move {
            Outcome::Persisted(epoch.execution.persist(generation).await)
        });
    }

    fn begin_commit_pause(&mut self) {
        let store = self.shared.store.clone();
        let id = self.id.clone();
        let transition = self.pause_transition();
        self.begin(Effect::CommitPause, async move {
            Outcome::PauseCommitted(Box::new(store.commit(id, transition).await))
        });
    }

    fn begin_run(&mut self) {
        let Some(epoch) = self.epoch.clone() else {
            return self.begin(Effect::Run, async { Outcome::Ran(Err(no_execution())) });
        };
        self.begin(Effect::Run, async move {
            Outcome::Ran(set_free(&*epoch.execution).await)
        });
    }

    fn begin_evict(&mut self) {
        let epoch = self.epoch.clone();
        let (shared, id) = (Arc::clone(&self.shared), self.id.clone());
        self.begin(Effect::Evict, async move {
            if let Some(epoch) = epoch {
                evict(&shared, &id, &epoch).await;
            }
            Outcome::Evicted
        });
    }

    async fn begin_delete(&mut self) {
        if self
            .operation
            .as_ref()
            .is_some_and(|operation| operation.effect == Effect::Delete)
        {
            return;
        }
        self.put_aside_commit();
        self.await_overtaken().await;
        let (shared, id, epoch) = (Arc::clone(&self.shared), self.id.clone(), self.epoch.clone());
        let event = NewEvent {
            at_unix_ms: shared.clock.now_unix_ms(),
            machine: id.clone(),
            execution: self.row.execution.clone(),
            kind: "machine.deleted",
            actor: self.pause.actor,
            detail: self.why_deleted(),
        };
        let ports: Vec<u16> = self
            .row
            .services
            .iter()
            .map(|service| service.listen_port)
            .collect();
        self.begin(Effect::Delete, async move {
            if let Some(epoch) = epoch {
                epoch.over.cancel();
                epoch.execution.quit().await;
            }
            Outcome::Deleted(delete(&shared, &id, event, &ports).await)
        });
    }
}

/// Requests under way end with the execution; connections that clients keep open wait for the next one.
async fn evict(shared: &Shared, id: &torpor_api::MachineId, epoch: &Epoch) {
    epoch.over.cancel();
    let Some(lines) = shared.lines.of(id) else {
        if !Arc::clone(&epoch.execution).stay() {
            epoch.execution.quit().await;
        }
        return;
    };
    if !epoch.execution.quit_parked(lines.over().clone()).await {
        shared.lines.lose(id);
    } else if lines.is_empty() {
        // The last one closed meanwhile, and found nothing to give up.
        shared.hypervisor.unpark(id);
    }
}

async fn delete(
    shared: &Shared,
    id: &torpor_api::MachineId,
    event: NewEvent,
    ports: &[u16],
) -> Result<(), MachineError> {
    // The row may know of services that were exposed since this driver read it.
    let row = shared.store.machine(id).await?;
    let now: Vec<u16> = row
        .iter()
        .flat_map(|row| &row.services)
        .map(|service| service.listen_port)
        .collect();
    for port in ports
        .iter()
        .chain(now.iter().filter(|port| !ports.contains(port)))
    {
        shared.routes.close(*port).await;
    }
    shared.hypervisor.delete_files(id).await?;
    shared.store.remove_machine(id.clone(), event).await?;
    Ok(())
}

/// A guest that cannot be set free is lost, so a VMM that is alive is asked more than once.
pub(super) async fn set_free(execution: &dyn Execution) -> Result<Ran, HypervisorError> {
    let mut n_tries = 1;
    loop {
        match execution.run().await {
            Err(error) if n_tries < RUN_TRIES && execution.exited().borrow().is_none() => {
                tracing::warn!(execution_id = %execution.id(), %error, "guest not set free, trying again");
                n_tries += 1;
                tokio::time::sleep(RUN_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

/// What a boot or a restore needs to know.
struct UpOrder {
    spec: MachineSpec,
    generation: u64,
    asked: Instant,
    /// Where the traffic that asked wants to go.
    first_port: Option<u16>,
    /// What a new machine begins with.
    first: First,
    /// How long it may wait for memory.
    patience: Patience,
    /// What it has already, because it reboots.
    memory: Option<Reservation>,
}

async fn admit(shared: &Shared, order: &mut UpOrder) -> Result<Reservation, MachineError> {
    let spec = &order.spec;
    match order.memory.take() {
        Some(memory) if memory.is_of(spec.mem_mib) => Ok(memory),
        Some(_) | None => Ok(shared
            .memory
            .reserve(&spec.id, spec.mem_mib, &order.patience)
            .await?),
    }
}

async fn boot(shared: Arc<Shared>, mut order: UpOrder) -> Outcome {
    let began = Instant::now();
    let memory = match admit(&shared, &mut order).await {
        Ok(memory) => memory,
        Err(error) => return Outcome::Booted(Err(error)),
    };
    let admitted = began.elapsed();
    let id = ExecutionId::generate();
    match first::start(&shared, &order.first, &order.spec, &id).await {
        Err(error) => Outcome::Booted(Err(error.into())),
        Ok(first) => Outcome::Booted(Ok(Up {
            execution: first.execution,
            image_generation: first.image_generation,
            memory,
            report: WakeReport {
                execution: id,
                decided: began.saturating_duration_since(order.asked),
                admitted,
                stages: first.stages,
                running: began.elapsed(),
            },
        })),
    }
}

async fn restore(shared: Arc<Shared>, mut order: UpOrder) -> Outcome {
    let began = Instant::now();
    let memory = match admit(&shared, &mut order).await {
        Ok(memory) => memory,
        Err(error) => return Outcome::Restored(Err(HypervisorError::new(error.code, error.message))),
    };
    // First come, first served; it is never closed.
    let _turn = shared.restoring.acquire().await;
    let admitted = began.elapsed();
    let id = ExecutionId::generate();
    match shared
        .hypervisor
        .restore(&order.spec, &id, order.generation, order.first_port)
        .await
    {
        Err(error) => Outcome::Restored(Err(error)),
        Ok((execution, stages)) => Outcome::Restored(Ok(Up {
            execution,
            image_generation: order.generation,
            memory,
            report: WakeReport {
                execution: id,
                decided: began.saturating_duration_since(order.asked),
                admitted,
                stages: Some(stages),
                running: began.elapsed(),
            },
        })),
    }
}

pub(super) fn no_execution() -> HypervisorError {
    HypervisorError::new(ErrorCode::Internal, "the machine has no live execution")
}
