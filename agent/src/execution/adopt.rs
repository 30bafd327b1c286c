//! Taking over the VMMs of an earlier torpord.
//!
//! Every run directory is either a machine that runs, whose VMM answers, or waste: a blank VMM, one that is gone,
//! one whose record makes no sense. Waste is ended (the process only if PID and start time are the recorded ones)
//! and removed; its slot is removed by the slot pool, which is told the slots in use. A VMM that lives and does
//! not answer is ended, too: its machine must not be started a second time over the same disk.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use torpor_api::vmm::VmmState;

use super::claim::{Claim, Claims};
use super::live::{Holdings, VmmExecution, put_manifest};
use super::parking::Parking;
use super::process::Process;
use super::record::{MachineRecord, RunDir};
use super::sleepers::Sleepers;
use crate::images::Images;
use crate::machine::hypervisor::Adopted;
use crate::net::SlotPool;
use crate::vmm_client::{VmmClient, VmmEvents, VmmStatus};

/// How long a VMM has to answer.
const STATUS_DEADLINE: Duration = Duration::from_secs(20);

struct Survivor {
    dir: RunDir,
    record: MachineRecord,
    process: Process,
    client: VmmClient,
    events: VmmEvents,
    status: VmmStatus,
}

/// The machines that run.
pub(super) struct Found(Vec<Survivor>);

/// Look through the run directories; waste is gone when this returns.
pub(super) async fn find(exec_dir: &Path) -> Found {
    let dirs = RunDir::all(exec_dir).unwrap_or_else(|error| {
        tracing::error!(error = super::chain(&error), "cannot look for running machines");
        Vec::new()
    });
    let judged = futures_util::future::join_all(dirs.into_iter().map(judge)).await;
    Found(judged.into_iter().flatten().collect())
}

async fn judge(dir: RunDir) -> Option<Survivor> {
    let record = match dir.read_record() {
        Ok(record) => record,
        Err(error) => {
            tracing::warn!(
                error = super::chain(&error),
                "run directory without a record removed"
            );
            dir.remove();
            return None;
        }
    };
    let process = Process::find(record.process);
    if let (Some(process), Some(machine)) = (process, record.machine.clone()) {
        match ask(&dir).await {
            Ok((client, events, status)) => {
                return Some(Survivor {
                    dir,
                    record: machine,
                    process,
                    client,
                    events,
                    status,
                });
            }
            Err(why) => {
                tracing::warn!(machine_id = %machine.machine_id, execution_id = %machine.execution_id, why,
                    "VMM can't be taken over, ending it");
            }
        }
    }
    if let Some(process) = Process::find(record.process) {
        process.kill();
        process.ended().await;
    }
    dir.remove();
    None
}

async fn ask(dir: &RunDir) -> Result<(VmmClient, VmmEvents, VmmStatus), String> {
    let (client, events) = VmmClient::connect(&dir.control_socket()).map_err(|error| super::chain(&error))?;
    let asked = tokio::time::timeout(STATUS_DEADLINE, client.status()).await;
    let status = asked.map_err(|_| format!("no answer in {STATUS_DEADLINE:?}"))?;
    let status = status.map_err(|error| super::chain(&error))?;
    match status.state {
        VmmState::Blank | VmmState::Dozing | VmmState::Exited => Err(format!("it is {:?}", status.state)),
        VmmState::Running | VmmState::Frozen | VmmState::Persisting | VmmState::Durable => {
            Ok((client, events, status))
        }
    }
}

impl Found {
    /// Numbers of the slots that carry a machine.
    pub(super) fn slots(&self) -> BTreeSet<u16> {
        self.0.iter().map(|survivor| survivor.record.slot).collect()
    }

    /// Make executions of them.
    pub(super) async fn take_over(
        self,
        slots: &SlotPool,
        images: &Images,
        claims: &Claims,
        (parking, sleepers): (&Arc<Parking>, &Arc<Sleepers>),
    ) -> Vec<Adopted> {
        let mut adopted = Vec::new();
        for survivor in self.0 {
            match claims.try_take(&survivor.record.machine_id) {
                Some(claim) => {
                    adopted.push(take_over(survivor, slots, images, claim, (parking, sleepers)).await)
                }
                None => end_twin(survivor, slots).await,
            }
        }
        adopted
    }
}

/// A second VMM of one machine can only be the work of a defect. Which of the two is the right one nobody knows.
async fn end_twin(survivor: Survivor, slots: &SlotPool) {
    tracing::error!(machine_id = %survivor.record.machine_id, execution_id = %survivor.record.execution_id,
        "machine runs twice, ending this execution");
    survivor.process.kill();
    survivor.process.ended().await;
    slots.discard(survivor.record.slot);
    survivor.dir.remove();
}

async fn take_over(
    survivor: Survivor,
    slots: &SlotPool,
    images: &Images,
    claim: Claim,
    (parking, sleepers): (&Arc<Parking>, &Arc<Sleepers>),
) -> Adopted {
    let Survivor {
        dir,
        record,
        process,
        client,
        events,
        status,
    } = survivor;
    let slot = slots.adopt(record.slot).map(|slot| {
        slot.keep();
        Arc::new(slot)
    });
    // Without its slot the machine is cut off until its next wake; ending it would cost its memory, too.
    let slot = slot.inspect_err(|error| {
        tracing::error!(machine_id = %record.machine_id, error = super::chain(error), "machine has lost its slot");
    });
    let files = images.machine(&record.machine_id);
    if status.state == VmmState::Durable
        && let Some(stats) = status.persisted
    {
        // torpord may have ended between the image durable and its manifest.
        let (files, record) = (files.clone(), record.clone());
        let put = super::blocking(torpor_api::ErrorCode::Internal, move || {
            let is_there = files.manifest().ok().flatten();
            if is_there.is_some_and(|manifest| manifest.generation == stats.generation) {
                return Ok(());
            }
            put_manifest(&files, &record, stats)
        });
        if let Err(error) = put.await {
            tracing::warn!(error = super::chain(&error), "durable image has no manifest");
        }
    }
    let machine = record.machine_id.clone();
    let execution = VmmExecution::start(Holdings {
        record,
        dir,
        process,
        client,
        events,
        files,
        slot: slot.ok(),
        parking: Arc::clone(parking),
        sleepers: Arc::clone(sleepers),
        claim,
    });
    Adopted {
        machine,
        state: status.state,
        execution,
    }
}
