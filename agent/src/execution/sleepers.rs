//! Machines that sleep with their VMM, because the operator gave RAM for it.
//!
//! Such a machine is paused like any other: nothing of it runs, its image is durable and what a restart of torpord or of the host
//! finds, and its next wake is a new execution. Only, that wake has less to do. A *resident* machine keeps its memory, too
//! (`limits.resident_mem_mib`, `limits.resident_s`), and needs no restore. A *dozing* one (`limits.dozing`) has given it back
//! and laid out its image instead, as a restore does: it holds its VMM and the pages that it is known to write, and the page cache
//! has the rest for as long as it likes. What can't be resident any longer dozes, if it may. Past the limits the VMM that was
//! used longest ago ends, and whatever else is done with the machine's files ends it first.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use torpor_api::http::SleeperCounts;
use torpor_api::vmm::{ExitReason, PersistStats, RestoreTrace};
use torpor_api::{ErrorCode, ExecutionId, MachineId};

use super::live::VmmExecution;
use super::start::{micros, shape_of};
use super::{Platform, wake};
use crate::guest_client::GuestClient;
use crate::machine::hypervisor::{
    ConnectError, Execution, FreezeTrace, HypervisorError, MachineSpec, Ran, SleeperLimits, VmmStatus,
    WakeStages, WokenFrom,
};
use crate::machine::usage::RunUsage;

/// A machine that was paused and keeps its VMM.
struct Sleeper {
    /// Of this pause, and no other.
    number: u64,
    execution: Arc<VmmExecution>,
    is_dozing: bool,
}

impl Sleeper {
    fn mem_mib(&self) -> u64 {
        self.execution.record().shape.mem_mib.into()
    }

    fn is_of(&self, machine: &MachineId) -> bool {
        self.execution.record().machine_id == *machine
    }

    fn woken_from(&self) -> WokenFrom {
        if self.is_dozing {
            WokenFrom::Dozing
        } else {
            WokenFrom::Resident
        }
    }
}

/// All of this host.
pub(super) struct Sleepers {
    limits: SleeperLimits,
    n_pauses: AtomicU64,
    /// Paused longest ago first.
    machines: Mutex<Vec<Sleeper>>,
}

impl Sleepers {
    pub(super) fn new(limits: SleeperLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            n_pauses: AtomicU64::new(0),
            machines: Mutex::default(),
        })
    }

    /// Keep a machine that was paused just now; answers whether there is room for it, which others may have to give up.
    pub(super) fn keep(self: &Arc<Self>, execution: Arc<VmmExecution>) -> bool {
        let number = self.n_pauses.fetch_add(1, Ordering::Relaxed);
        let one = Sleeper {
            number,
            execution,
            is_dozing: false,
        };
        let can_be_resident = one.mem_mib() <= self.limits.resident_mem_mib;
        if !can_be_resident && self.limits.dozing == 0 {
            return false;
        }
        self.machines().push(one);
        self.settle(|one| one.number == number && !can_be_resident);
        if can_be_resident {
            let sleepers = Arc::clone(self);
            tokio::spawn(async move {
                tokio::time::sleep(sleepers.limits.resident_for).await;
                sleepers.settle(|one| one.number == number);
            });
        }
        true
    }

    /// Let those doze that may not be resident any longer, and end those that may not doze either.
    fn settle(self: &Arc<Self>, is_past_its_time: impl Fn(&Sleeper) -> bool) {
        let mut machines = self.machines();
        let (mut mem_mib, mut n_dozing) = (0, 0);
        let (mut falling_asleep, mut over) = (Vec::new(), Vec::new());
        // Who was paused last comes first.
        for one in machines.iter_mut().rev() {
            let was_dozing = one.is_dozing;
            if !was_dozing && !is_past_its_time(one) {
                mem_mib += one.mem_mib();
                if mem_mib <= self.limits.resident_mem_mib {
                    continue;
                }
            }
            one.is_dozing = true;
            n_dozing += 1;
            if n_dozing > self.limits.dozing {
                over.push(one.number);
            } else if !was_dozing {
                falling_asleep.push((one.number, Arc::clone(&one.execution)));
            }
        }
        for one in machines.extract_if(.., |one| over.contains(&one.number)) {
            tokio::spawn(async move { one.execution.quit().await });
        }
        drop(machines);
        for (number, execution) in falling_asleep {
            tokio::spawn(Arc::clone(self).doze(number, execution));
        }
    }

    /// A wake that comes meanwhile has the VMM resume after that, or finds it resumed before, and then the doze is refused.
    async fn doze(self: Arc<Self>, number: u64, execution: Arc<VmmExecution>) {
        let machine_id = &execution.record().machine_id;
        match execution.doze().await {
            Ok(()) => tracing::debug!(%machine_id, "machine dozes"),
            Err(error) if self.end_if(|one| one.number == number).await => {
                tracing::warn!(%machine_id, error = super::chain(&error), "machine can't doze, its VMM was ended");
            }
            Err(_) => {}
        }
    }

    fn take(&self, is_it: impl Fn(&Sleeper) -> bool) -> Option<Sleeper> {
        let mut machines = self.machines();
        let place = machines.iter().position(is_it)?;
        Some(machines.remove(place))
    }

    async fn end_if(&self, is_it: impl Fn(&Sleeper) -> bool) -> bool {
        let taken = self.take(is_it);
        if let Some(one) = &taken {
            one.execution.quit().await;
        }
        taken.is_some()
    }

    /// End the machine's VMM, if it has one here; answers when its files are closed.
    pub(super) async fn end(&self, machine: &MachineId) {
        self.end_if(|one| one.is_of(machine)).await;
    }

    /// End the VMM that was kept first; answers whether there was one.
    pub(super) async fn end_oldest(&self) -> bool {
        self.end_if(|_| true).await
    }

    /// How many there are.
    pub(super) fn counts(&self) -> SleeperCounts {
        let machines = self.machines();
        let (dozing, resident): (Vec<_>, Vec<_>) = machines.iter().partition(|one| one.is_dozing);
        SleeperCounts {
            resident: resident.len() as u64,
            resident_mem_mib: resident.iter().map(|one| one.mem_mib()).sum(),
            dozing: dozing.len() as u64,
        }
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Sleeper>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Platform {
    /// Wake a machine whose VMM is still there. `None` if it is not, or not as the caller wants it, or if it fails: then the
    /// image is what to wake it from, unless the guest has used its disk by then, which the restore finds out.
    pub(super) async fn resume_sleeper(
        &self,
        machine: &MachineSpec,
        id: &ExecutionId,
        generation: u64,
        first_port: Option<u16>,
    ) -> Option<(Arc<dyn Execution>, WakeStages)> {
        let sleeper = self.sleepers.take(|one| one.is_of(&machine.id))?;
        let from = sleeper.woken_from();
        let vmm = sleeper.execution;
        let record = vmm.record();
        let fits = record.shape == shape_of(machine)
            && record.template_digest == machine.template_digest
            && vmm.is_durable_as(generation);
        if !fits {
            vmm.quit().await;
            return None;
        }
        match resume(machine, (&vmm, from), id, first_port).await {
            Ok(stages) => Some((Arc::new(Resumed { id: id.clone(), vmm }), stages)),
            Err(error) => {
                tracing::info!(machine_id = %machine.id, error = super::chain(&error), "VMM of a sleeping machine given up");
                vmm.quit().await;
                None
            }
        }
    }
}

async fn resume(
    machine: &MachineSpec,
    (vmm, from): (&VmmExecution, WokenFrom),
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
        from,
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
