//! The one virtual machine of this process: owner of everything, and its state machine.
//!
//! ```text
//! Blank --prepare--> Blank --boot|restore--> Running --freeze--> Frozen --persist--> Persisting --> Durable
//!                                               ^                   |                     |            |
//!                                               +-------- run ------+---------------------+------------+
//!                                               +------ resume ------------------- Dozing <--- doze ---+
//! ```
//! All of it is called from the control thread. The other threads are the vCPUs', the devices', the one that
//! fills memory, and, while `Persisting`, the one that writes. They report by [`VmEvent`].
//!
//! Invariants: devices run only while vCPUs may; the state in an image is that of the freeze; a persist that was
//! cancelled may still be running when the guest is; the next one's thread waits for it, the control thread never.

mod build;
mod doze;
mod error;
mod persist;
mod restore;

pub use build::{Files, ImageFiles, Prepared};
pub use error::{VmError, chain};
pub use restore::RestoreRequest;

use crate::arch::{self, VcpuState, VmState};
use crate::devices::{DeviceSet, DevicesState};
use crate::image::persist::PersistError;
use crate::image::{Extent, HostSignature, ImageFile};
use crate::layout::PAGE_SIZE;
use crate::memory::lazy::FillCounts;
use crate::memory::{Backing, Ram};
use crate::pm1::Pm1;
use crate::sys::process;
use crate::sys::uffd::Uffd;
use crate::vcpu::Vcpu;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;
use torpor_api::vmm::{Counters, ExitReason, PersistStats, Shape, VmmState};

/// What other threads tell the control thread.
#[derive(Debug)]
pub enum VmEvent {
    /// The guest ended.
    GuestEnded(ExitReason),
    /// A persist ended.
    PersistEnded {
        /// Which.
        job: u64,
        /// How.
        result: Result<PersistStats, PersistError>,
    },
    /// A copy ahead ended.
    PreCopyEnded {
        /// Which.
        job: u64,
        /// How; what the image holds now.
        result: Result<Arc<ImageFile>, PersistError>,
    },
}

/// Where those reports go; callable from any thread.
pub type EventSink = Arc<dyn Fn(VmEvent) + Send + Sync>;

/// Everything of a frozen machine but its memory, as it is encoded in an image.
#[derive(Debug, Serialize, Deserialize)]
struct MachineState {
    vm: VmState,
    vcpus: Vec<VcpuState>,
    pm1_enable: u16,
    devices: DevicesState,
}

#[derive(Debug)]
enum Phase {
    Running,
    Frozen,
    Persisting {
        job: u64,
        cancel: Arc<AtomicBool>,
        /// Becomes the baseline if the persist ends well.
        baseline: Arc<ImageFile>,
    },
    Durable,
    Dozing,
    Exited,
}

/// A machine with memory.
pub struct Vm {
    // Dropped in this order: vCPU threads end before what they use.
    vcpus: Vec<Vcpu>,
    devices: Arc<RwLock<DeviceSet>>,
    pm1: Arc<Pm1>,
    backing: Backing,
    ram: Arc<Ram>,
    vm_fd: VmFd,
    uffd: Uffd,
    can_pre_fault: bool,
    shape: Shape,
    host: HostSignature,
    events: EventSink,
    phase: Phase,
    /// Encoded state and disk generation of the last freeze.
    frozen: Option<(Vec<u8>, u64)>,
    /// The file that a persist rewrites in place, with its checksums.
    baseline: Option<Arc<ImageFile>>,
    /// The file that untouched pages are in.
    restored_from: Option<Arc<ImageFile>>,
    /// What the wake of this process needed up to its first response byte.
    working_set: Vec<Extent>,
    /// Held by the thread that writes an image.
    writing: Arc<Mutex<()>>,
    /// Ends a copy ahead that may be under way.
    pre_copy_cancel: Arc<AtomicBool>,
    /// Bytes that were copied ahead since the last persist.
    pre_copied_bytes: Arc<AtomicU64>,
    n_jobs: u64,
    persisted: Option<PersistStats>,
}

impl Vm {
    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> VmmState {
        match self.phase {
            Phase::Running => VmmState::Running,
            Phase::Frozen => VmmState::Frozen,
            Phase::Persisting { .. } => VmmState::Persisting,
            Phase::Durable => VmmState::Durable,
            Phase::Dozing => VmmState::Dozing,
            Phase::Exited => VmmState::Exited,
        }
    }

    /// What it was built as.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The last persist that ended well.
    #[must_use]
    pub fn persisted(&self) -> Option<PersistStats> {
        self.persisted
    }

    /// Counters of this execution.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let filled = match &self.backing {
            Backing::Anonymous => FillCounts::default(),
            Backing::Lazy(lazy) => lazy.counts(),
        };
        let devices = self.read_devices().counters();
        Counters {
            uffd_faults: filled.faults,
            uffd_faults_first_byte: filled.faults_first_byte,
            mapped_faults_first_byte: filled.mapped_faults_first_byte,
            pages_filled: filled.pages,
            net_rx_bytes: devices.net_rx_bytes,
            net_tx_bytes: devices.net_tx_bytes,
            disk_read_bytes: devices.disk_read_bytes,
            disk_written_bytes: devices.disk_written_bytes,
        }
    }

    fn read_devices(&self) -> RwLockReadGuard<'_, DeviceSet> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_devices(&self) -> RwLockWriteGuard<'_, DeviceSet> {
        self.devices.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, allowed: bool, operation: &'static str) -> Result<(), VmError> {
        if allowed {
            return Ok(());
        }
        Err(VmError::NotInThisState {
            operation,
            state: self.state(),
        })
    }

    /// Stop the vCPUs, hold the devices still and take their state. No I/O.
    ///
    /// # Errors
    /// Not running, or KVM refused; then the machine is frozen all the same and can only be run.
    pub fn freeze(&mut self) -> Result<u64, VmError> {
        self.expect(matches!(self.phase, Phase::Running), "freeze")?;
        let started = Instant::now();
        let stopped = self.stop();
        // Also after an error: what did stop has to be run again.
        self.frozen = None;
        self.phase = Phase::Frozen;
        stopped?;
        let state = MachineState {
            vm: arch::save_vm(&self.vm_fd)?,
            vcpus: self.save_vcpus()?,
            pm1_enable: self.pm1.save(),
            devices: self.read_devices().save(),
        };
        let encoded = postcard::to_stdvec(&state).map_err(VmError::EncodeState)?;
        let disk_generation = self.read_devices().disk_generation();
        self.frozen = Some((encoded, disk_generation));
        Ok(micros(started))
    }

    /// Stop vCPUs and devices, all that can be stopped, whatever becomes of the others.
    fn stop(&self) -> Result<(), VmError> {
        for vcpu in &self.vcpus {
            vcpu.request_stop();
        }
        let stopped = first_error(self.vcpus.iter().map(Vcpu::stopped));
        self.write_devices().freeze();
        Ok(stopped?)
    }

    fn save_vcpus(&self) -> Result<Vec<VcpuState>, VmError> {
        let asked: Vec<_> = self.vcpus.iter().map(Vcpu::save).collect();
        // Every answer is taken, or it would be taken for that of the next question.
        let answers: Vec<_> = self
            .vcpus
            .iter()
            .zip(asked)
            .map(|(vcpu, asked)| asked.and_then(|()| vcpu.saved()))
            .collect();
        Ok(answers.into_iter().collect::<Result<_, _>>()?)
    }

    /// Run a machine that is frozen in any way; whether a persist was ended by it, and how long it took.
    ///
    /// # Errors
    /// It is running, or ended.
    pub fn run(&mut self) -> Result<(bool, u64), VmError> {
        let started = Instant::now();
        let persist_cancelled = match &self.phase {
            Phase::Running | Phase::Dozing | Phase::Exited => {
                return self.expect(false, "run").map(|()| (false, 0));
            }
            Phase::Frozen | Phase::Durable => false,
            Phase::Persisting { cancel, .. } => {
                cancel.store(true, Ordering::Release);
                true
            }
        };
        self.write_devices().thaw();
        let released = first_error(self.vcpus.iter().map(Vcpu::run));
        self.phase = Phase::Running;
        released?;
        Ok((persist_cancelled, micros(started)))
    }

    /// A persist thread reported. What the control connection is to be told, if that persist still counts.
    ///
    /// # Errors
    /// The guest could not be run again after a failure.
    pub fn persist_ended(
        &mut self,
        job: u64,
        result: Result<PersistStats, PersistError>,
    ) -> Result<Option<Result<PersistStats, PersistError>>, VmError> {
        let baseline = match &self.phase {
            Phase::Persisting {
                job: current,
                baseline,
                ..
            } if *current == job => Arc::clone(baseline),
            _ => return Ok(None),
        };
        if let Ok(stats) = &result {
            self.phase = Phase::Durable;
            self.baseline = Some(baseline);
            self.persisted = Some(*stats);
        } else {
            self.run()?;
        }
        Ok(Some(result))
    }

    /// The first response byte left.
    pub fn first_byte(&mut self) {
        self.record_working_set(true);
        process::trim_heap();
    }

    /// Best effort: without a set the next wake is slower.
    fn record_working_set(&mut self, has_answered: bool) {
        let Backing::Lazy(lazy) = &self.backing else {
            return;
        };
        match lazy.take_working_set(has_answered) {
            Ok(Some(set)) => self.working_set = set,
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "working set not recorded"),
        }
    }

    /// Write all of guest memory, in order of RAM offsets.
    ///
    /// # Errors
    /// Not frozen, or writing failed.
    pub fn dump(&self, mut target: File) -> Result<(), VmError> {
        self.expect(!matches!(self.phase, Phase::Running | Phase::Exited), "dump")?;
        let mut buffer = vec![0; 256 * PAGE_SIZE];
        let n_pages = self.ram.layout().n_pages();
        for first in (0..n_pages).step_by(256) {
            let n = usize::try_from((n_pages - first).min(256)).unwrap_or(0);
            self.ram.copy_out(first, &mut buffer[..n * PAGE_SIZE]);
            target
                .write_all(&buffer[..n * PAGE_SIZE])
                .map_err(VmError::Dump)?;
        }
        Ok(())
    }

    /// The guest ended by itself: bring its disk to rest.
    pub fn end(&mut self) {
        match &self.phase {
            Phase::Exited => return,
            Phase::Running => {
                if let Err(error) = self.stop() {
                    tracing::warn!(%error, "cannot stop the vCPUs of a guest that ended");
                }
            }
            // The end was on its way here when the guest was frozen.
            Phase::Persisting { cancel, .. } => cancel.store(true, Ordering::Release),
            Phase::Frozen | Phase::Durable | Phase::Dozing => {}
        }
        if let Err(error) = self.read_devices().flush_disk() {
            tracing::error!(%error, "cannot flush the disk of a guest that ended");
        }
        self.phase = Phase::Exited;
    }
}

/// Goes through all of them before it says what the first error was.
fn first_error<E>(results: impl Iterator<Item = Result<(), E>>) -> Result<(), E> {
    let mut first = Ok(());
    for result in results {
        first = first.and(result);
    }
    first
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::first_error;

    #[test]
    fn every_vcpu_is_asked_although_an_earlier_one_failed() {
        let mut n_asked = 0;
        let results = [Ok(()), Err("second"), Ok(()), Err("fourth")];
        let first = first_error(results.into_iter().inspect(|_| n_asked += 1));
        assert_eq!((first, n_asked), (Err("second"), 4));
    }
}
