//! Snapshots of a machine, one after the other: of a running one within a moment in which it stands still, of a
//! paused one from its files.
//!
//! A running guest is frozen, written to the machine's own image, and set free as soon as the snapshot's files are
//! links to, or copies of, what was written; its execution is the same before and after. Whatever fails, the guest
//! is set free. A snapshot that is wanted while something else is under way waits for the end of it.
//!
//! Not its job: making the files durable and the row, which need no machine that stands still.

use super::super::error::MachineError;
use super::super::fleet::Shared;
use super::super::hypervisor::{Execution, FreezeTrace, HypervisorError, MachineSpec, Ran};
use super::super::state::{Denied, Effect, Event, State, next};
use super::Driver;
use super::effects::{no_execution, set_free};
use super::operation::Outcome;
use super::waiters::Reply;
use std::collections::VecDeque;
use std::sync::Arc;
use torpor_api::vmm::PersistStats;
use torpor_api::{ErrorCode, ExecutionId, SnapshotId};

/// A snapshot whose files are in place, and not yet durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// The execution that was held still for it.
    pub execution: Option<ExecutionId>,
    /// How the guest was stopped; absent if it slept.
    pub freeze: Option<FreezeTrace>,
    /// What was written of its memory; absent if it slept.
    pub persist: Option<PersistStats>,
}

/// Snapshots that are wanted, and the one under way.
#[derive(Default)]
pub(super) struct Snapshots {
    wanted: VecDeque<(SnapshotId, Reply<Staged>)>,
    under_way: Option<Reply<Staged>>,
}

impl Snapshots {
    pub(super) fn is_empty(&self) -> bool {
        self.wanted.is_empty() && self.under_way.is_none()
    }

    fn begin(&mut self) -> Option<SnapshotId> {
        // Whoever gave up wants no snapshot any more.
        self.wanted.retain(|(_, reply)| !reply.is_closed());
        let (id, reply) = self.wanted.pop_front()?;
        self.under_way = Some(reply);
        Some(id)
    }

    fn end(&mut self, outcome: Result<Staged, MachineError>) {
        if let Some(reply) = self.under_way.take() {
            let _ = reply.send(outcome);
        }
    }
}

impl Driver {
    pub(super) async fn on_snapshot(&mut self, id: SnapshotId, reply: Reply<Staged>) {
        match next(self.state, Event::Snapshot) {
            Err(Denied::Busy) => self.snapshots.wanted.push_back((id, reply)),
            Err(denied) => {
                let _ = reply.send(Err(self.refusal("take a snapshot of", denied)));
            }
            Ok(_) => {
                self.snapshots.wanted.push_back((id, reply));
                self.settle_and_go_on().await;
            }
        }
    }

    /// The event that takes the next snapshot, if one is wanted and the machine is ready for it.
    pub(super) fn next_snapshot(&mut self) -> Option<Event> {
        let ready = self.uncommitted.is_none() && self.operation.is_none() && self.overtaken.is_none();
        let wanted = self.snapshots.wanted.iter().any(|(_, reply)| !reply.is_closed());
        (ready && wanted).then_some(Event::Snapshot)
    }

    /// A machine that has come to rest elsewhere takes no snapshot; one that was under way has failed.
    pub(super) fn refuse_snapshots(&mut self) {
        let cut_short = || {
            let message = format!("the machine went away while a snapshot of {} was taken", self.id);
            MachineError::new(ErrorCode::SnapshotFailed, message)
        };
        if !matches!(self.state, State::Capturing | State::Copying) && self.snapshots.under_way.is_some() {
            let error = self.failure.clone().unwrap_or_else(cut_short);
            self.snapshots.end(Err(error));
        }
        let Err(denied) = next(self.state, Event::Snapshot) else {
            return;
        };
        if denied == Denied::Busy {
            return;
        }
        for (_, reply) in std::mem::take(&mut self.snapshots.wanted) {
            let _ = reply.send(Err(self.refusal("take a snapshot of", denied)));
        }
    }

    pub(super) fn begin_capture(&mut self) {
        self.image_floor += 1;
        let generation = self.image_floor;
        self.report = None;
        let order = CaptureOrder {
            shared: Arc::clone(&self.shared),
            spec: self.row.spec.clone(),
            generation,
        };
        let (Some(snapshot), Some(epoch)) = (self.snapshots.begin(), self.epoch.clone()) else {
            return self.begin(Effect::Capture, async {
                Outcome::Captured(Err(no_execution().into()), Err(no_execution()))
            });
        };
        self.begin(Effect::Capture, async move {
            let staged = capture(&order, &*epoch.execution, &snapshot).await;
            let ran = set_free(&*epoch.execution).await;
            Outcome::Captured(staged, ran)
        });
    }

    pub(super) fn begin_copy(&mut self) {
        let (shared, spec, generation) = (
            Arc::clone(&self.shared),
            self.row.spec.clone(),
            self.row.image_generation,
        );
        let snapshot = self.snapshots.begin();
        self.begin(Effect::Copy, async move {
            let Some(snapshot) = snapshot else {
                return Outcome::Copied(Err(no_execution().into()));
            };
            let staged = shared
                .hypervisor
                .stage_snapshot(&spec, generation, &snapshot)
                .await;
            Outcome::Copied(staged.map_err(MachineError::from).map(|()| Staged {
                execution: None,
                freeze: None,
                persist: None,
            }))
        });
    }

    pub(super) async fn captured(
        &mut self,
        staged: Result<Staged, MachineError>,
        ran: Result<Ran, HypervisorError>,
    ) -> Event {
        if let Err(error) = &staged {
            tracing::error!(machine_id = %self.id, %error, "no snapshot taken");
        }
        self.snapshots.end(staged);
        match ran {
            Ok(_) => Event::Captured,
            Err(error) => self.run_failed(&error).await,
        }
    }

    pub(super) fn copied(&mut self, staged: Result<Staged, MachineError>) -> Event {
        self.snapshots.end(staged);
        Event::Copied
    }
}

struct CaptureOrder {
    shared: Arc<Shared>,
    spec: MachineSpec,
    generation: u64,
}

/// The guest stands still when this returns, or runs.
async fn capture(
    order: &CaptureOrder,
    execution: &dyn Execution,
    snapshot: &SnapshotId,
) -> Result<Staged, MachineError> {
    let freeze = execution.freeze().await.map_err(not_taken)?;
    let persist = execution.persist(order.generation).await.map_err(not_taken)?;
    order
        .shared
        .hypervisor
        .stage_snapshot(&order.spec, order.generation, snapshot)
        .await?;
    Ok(Staged {
        execution: Some(execution.id().clone()),
        freeze: Some(freeze),
        persist: Some(persist),
    })
}

/// A pause that nobody asked for did not fail.
fn not_taken(error: HypervisorError) -> MachineError {
    let mut error = MachineError::from(error);
    if error.code == ErrorCode::PauseFailed {
        error.code = ErrorCode::SnapshotFailed;
    }
    error
}
