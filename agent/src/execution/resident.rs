//! Machines that sleep with their VMM: frozen, their image durable, and their memory still in RAM.
//!
//! Such a machine is paused like any other: nothing of it runs, its image is what a restart of torpord or of the host finds,
//! and its next wake is a new execution. Only, that wake needs no restore. The price is RAM, so the operator says how much
//! (`limits.resident_mem_mib`, none by default) and for how long (`limits.resident_s`); past either the VMM that was used
//! longest ago ends. Whatever else is done with the machine's files ends its VMM first.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use torpor_api::vmm::{ExitReason, PersistStats, RestoreTrace};
use torpor_api::{ErrorCode, ExecutionId, MachineId};

use super::live::VmmExecution;
use super::start::{micros, shape_of};
use super::{Platform, wake};
use crate::guest_client::GuestClient;
use crate::machine::hypervisor::{
    ConnectError, Execution, FreezeTrace, HypervisorError, MachineSpec, Ran, VmmStatus, WakeStages,
};
use crate::machine::usage::RunUsage;

/// A machine that was paused and keeps its VMM.
struct Kept {
    /// Of this pause, and no other.
    number: u64,
    execution: Arc<VmmExecution>,
}

impl Kept {
    fn mem_mib(&self) -> u64 {
        self.execution.record().shape.mem_mib.into()
    }

    fn is_of(&self, machine: &MachineId) -> bool {
        self.execution.record().machine_id == *machine
    }
}

/// All resident machines of this host.
pub(super) struct Residents {
    most_mib: u64,
    longest: Duration,
    n_pauses: AtomicU64,
    /// Paused longest ago first.
    machines: Mutex<Vec<Kept>>,
}

impl Residents {
    pub(super) fn new(most_mib: u64, longest: Duration) -> Arc<Self> {
        Arc::new(Self {
            most_mib,
            longest,
            n_pauses: AtomicU64::new(0),
            machines: Mutex::default(),
        })
    }

    /// Keep a machine that was paused just now; answers whether there is room for it, which others may have to give up.
    pub(super) fn keep(self: &Arc<Self>, execution: Arc<VmmExecution>) -> bool {
        let number = self.n_pauses.fetch_add(1, Ordering::Relaxed);
        let kept = Kept { number, execution };
        if kept.mem_mib() > self.most_mib {
            return false;
        }
        for one in self.add(kept) {
            tokio::spawn(async move { one.execution.quit().await });
        }
        let residents = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(residents.longest).await;
            residents.end_if(|one| one.number == number).await;
        });
        true
    }

    /// Add one; those that have to go for it.
    fn add(&self, kept: Kept) -> Vec<Kept> {
        let mut machines = self.machines();
        machines.push(kept);
        let sums = machines.iter().rev().scan(0, |sum, one| {
            *sum += one.mem_mib();
            Some(*sum)
        });
        let n_fitting = sums.take_while(|sum| *sum <= self.most_mib).count();
        let n_over = machines.len() - n_fitting;
        machines.drain(..n_over).collect()
    }

    fn take(&self, is_it: impl Fn(&Kept) -> bool) -> Option<Arc<VmmExecution>> {
        let mut machines = self.machines();
        let place = machines.iter().position(is_it)?;
        Some(machines.remove(place).execution)
    }

    async fn end_if(&self, is_it: impl Fn(&Kept) -> bool) -> bool {
        let execution = self.take(is_it);
        if let Some(execution) = &execution {
            execution.quit().await;
        }
        execution.is_some()
    }

    /// End the machine's VMM, if it has one here; answers when its files are closed.
    pub(super) async fn end(&self, machine: &MachineId) {
        self.end_if(|one| one.is_of(machine)).await;
    }

    /// End the VMM that was kept first; answers whether there was one.
    pub(super) async fn end_oldest(&self) -> bool {
        self.end_if(|_| true).await
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Platform {
    /// Wake a machine whose VMM is still there. `None` if it is not, or not as the caller wants it, or if it fails: then the
    /// image is what to wake it from, unless the guest has used its disk by then, which the restore finds out.
    pub(super) async fn resume_resident(
        &self,
        machine: &MachineSpec,
        id: &ExecutionId,
        generation: u64,
        first_port: Option<u16>,
    ) -> Option<(Arc<dyn Execution>, WakeStages)> {
        let vmm = self.residents.take(|one| one.is_of(&machine.id))?;
        let record = vmm.record();
        let fits = record.shape == shape_of(machine)
            && record.template_digest == machine.template_digest
            && vmm.is_durable_as(generation);
        if !fits {
            vmm.quit().await;
            return None;
        }
        match resume(machine, &vmm, id, first_port).await {
            Ok(stages) => Some((Arc::new(Resumed { id: id.clone(), vmm }), stages)),
            Err(error) => {
                tracing::warn!(machine_id = %machine.id, error = super::chain(&error), "resident VMM given up");
                vmm.quit().await;
                None
            }
        }
    }
}

async fn resume(
    machine: &MachineSpec,
    vmm: &VmmExecution,
    id: &ExecutionId,
    first_port: Option<u16>,
) -> Result<WakeStages, HypervisorError> {
    let begun = Instant::now();
    let named = vmm.rename(id);
    named.map_err(|error| {
        HypervisorError::new(ErrorCode::ResumeFailed, "cannot record the execution").because(error)
    })?;
    if let Some(port) = first_port {
        vmm.connect_early(port);
    }
    let vmm_ready_us = micros(begun);
    let resumed = async {
        let ran = vmm.client().resume().await?;
        let trace = RestoreTrace {
            running_us: ran.run_us,
            ..RestoreTrace::default()
        };
        Ok((trace, micros(begun)))
    };
    let finished = wake::finish(resumed, &vmm.guest()).await;
    let ((trace, restored_us), resync) = finished.map_err(|failure| wake::error(machine, failure))?;
    wake::drop_after_answer(resync);
    Ok(WakeStages {
        vmm_ready_us,
        restored_us,
        resynced_us: micros(begun),
        is_resident: true,
        vmm: trace,
    })
}

/// Another execution of a machine in the VMM of the one before.
struct Resumed {
    id: ExecutionId,
    vmm: Arc<VmmExecution>,
}

#[async_trait]
impl Execution for Resumed {
    fn id(&self) -> &ExecutionId {
        &self.id
    }

    async fn freeze(&self) -> Result<FreezeTrace, HypervisorError> {
        self.vmm.freeze().await
    }

    async fn pre_copy(&self) -> Result<(), HypervisorError> {
        self.vmm.pre_copy().await
    }

    async fn persist(&self, generation: u64) -> Result<PersistStats, HypervisorError> {
        self.vmm.persist(generation).await
    }

    async fn run(&self) -> Result<Ran, HypervisorError> {
        self.vmm.run().await
    }

    async fn quit(&self) {
        self.vmm.quit().await;
    }

    async fn quit_parked(&self, lost: CancellationToken) -> bool {
        self.vmm.quit_parked(lost).await
    }

    fn stay(self: Arc<Self>) -> bool {
        Arc::clone(&self.vmm).stay()
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.vmm.exited()
    }

    async fn connect(&self, port: u16) -> Result<TcpStream, ConnectError> {
        self.vmm.connect(port).await
    }

    fn guest(&self) -> GuestClient {
        self.vmm.guest()
    }

    async fn first_byte(&self) {
        self.vmm.first_byte().await;
    }

    async fn usage(&self) -> RunUsage {
        self.vmm.usage().await
    }

    async fn status(&self) -> Result<VmmStatus, HypervisorError> {
        self.vmm.status().await
    }
}
