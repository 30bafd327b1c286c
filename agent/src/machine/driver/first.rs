//! The first execution of a machine: a boot, or a restore of a snapshot as another machine.
//!
//! A boot can leave a snapshot behind: of the guest as it is in the moment in which its agent first answers, before
//! anybody is let in. That costs the first create of a shape one persist, and saves every later one its boot.
//! Nothing about it can make a create fail that would not fail without it.

use super::super::fleet::Shared;
use super::super::hypervisor::{Execution, HypervisorError, MachineSpec, WakeStages};
use super::effects::set_free;
use std::sync::Arc;
use torpor_api::{ErrorCode, ExecutionId, SnapshotId};

/// How a new machine gets its first execution.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum First {
    /// A boot.
    #[default]
    Boot,
    /// A boot, of which this snapshot is staged.
    BootAndKeep(SnapshotId),
    /// A restore of this snapshot; a boot if that can't be had.
    Warm(SnapshotId),
    /// A restore of this snapshot, and nothing else.
    GoOn(SnapshotId),
}

/// A first execution.
pub(super) struct Started {
    pub(super) execution: Arc<dyn Execution>,
    /// Absent for a boot.
    pub(super) stages: Option<WakeStages>,
    /// Generation of the newest image that was begun.
    pub(super) image_generation: u64,
}

impl Started {
    fn booted(execution: Arc<dyn Execution>) -> Self {
        Self {
            execution,
            stages: None,
            image_generation: 0,
        }
    }
}

pub(super) async fn start(
    shared: &Shared,
    first: &First,
    spec: &MachineSpec,
    id: &ExecutionId,
) -> Result<Started, HypervisorError> {
    match first {
        First::Boot => shared.hypervisor.boot(spec, id).await.map(Started::booted),
        First::BootAndKeep(snapshot) => boot_and_keep(shared, snapshot, spec, id).await,
        First::GoOn(snapshot) => go_on(shared, snapshot, spec, id).await,
        First::Warm(snapshot) => match go_on(shared, snapshot, spec, id).await {
            Err(error) if error.code != ErrorCode::CapacityExceeded => {
                tracing::warn!(machine_id = %spec.id, snapshot_id = %snapshot, %error,
                    "warm template can't be used, booting");
                give_up(shared, snapshot).await;
                // What the snapshot left is not the disk of a machine that boots.
                shared.hypervisor.delete_files(&spec.id).await?;
                shared.hypervisor.boot(spec, id).await.map(Started::booted)
            }
            outcome => outcome,
        },
    }
}

async fn go_on(
    shared: &Shared,
    snapshot: &SnapshotId,
    spec: &MachineSpec,
    id: &ExecutionId,
) -> Result<Started, HypervisorError> {
    let generation = shared.hypervisor.clone_snapshot(snapshot, spec).await?;
    let (execution, stages) = shared.hypervisor.restore(spec, id, generation, None).await?;
    Ok(Started {
        execution,
        stages: Some(stages),
        image_generation: generation,
    })
}

async fn boot_and_keep(
    shared: &Shared,
    snapshot: &SnapshotId,
    spec: &MachineSpec,
    id: &ExecutionId,
) -> Result<Started, HypervisorError> {
    const GENERATION: u64 = 1;
    let execution = shared.hypervisor.boot(spec, id).await?;
    let kept = async {
        execution.freeze().await?;
        execution.persist(GENERATION).await?;
        shared.hypervisor.stage_snapshot(spec, GENERATION, snapshot).await
    };
    if let Err(error) = kept.await {
        tracing::warn!(machine_id = %spec.id, %error, "no warm template made");
    }
    // Whatever was reached, the guest has to run; one that does not is no machine to hand out.
    if let Err(error) = set_free(&*execution).await {
        execution.quit().await;
        return Err(error);
    }
    Ok(Started {
        execution,
        stages: None,
        image_generation: GENERATION,
    })
}

/// A warm template that failed once is not tried again; the next boot makes another.
async fn give_up(shared: &Shared, snapshot: &SnapshotId) {
    let removed = async {
        shared.store.doom_snapshot(snapshot.clone(), None).await?;
        shared.hypervisor.delete_snapshot(snapshot).await?;
        shared.store.remove_snapshot(snapshot.clone(), None).await?;
        Ok::<(), super::super::error::MachineError>(())
    };
    if let Err(error) = removed.await {
        tracing::warn!(snapshot_id = %snapshot, %error, "warm template not removed yet");
    }
}
