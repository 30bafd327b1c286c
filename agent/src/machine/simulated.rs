//! A platform without VMMs: executions are values in memory, time passes only when a test says so.
//!
//! The host outlives every torpord that uses it, so a test drops one and starts the next over it. Calls can be held
//! at named points, made to fail there, or the VMM made to die there. It checks by itself what no caller may do:
//! two live executions of one machine, and memory resumed over a newer disk, are violations.

mod execution;
mod faults;
mod guest;
mod snapshots;

pub use execution::SimulatedExecution;
pub use faults::{Fault, Faults, Hold, Point};

use super::hypervisor::{
    Adopted, Execution, Hypervisor, HypervisorError, ImageState, MachineSpec, TemplateInfo, WakeStages,
    WokenFrom,
};
use async_trait::async_trait;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;
use torpor_api::http::Pools;
use torpor_api::vmm::{RestoreTrace, VmmState};
use torpor_api::{ErrorCode, ExecutionId, MachineId, SnapshotId};

/// What a simulated guest holds in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Memory {
    /// A number that only this memory knows.
    pub counter: u64,
    /// The disk's generation that this memory knows.
    pub disk_generation: u64,
}

#[derive(Debug, Clone)]
struct SavedImage {
    generation: u64,
    memory: Memory,
    corrupt: bool,
    /// A restore makes another machine of it.
    fork: bool,
}

#[derive(Debug, Clone, Default)]
struct Files {
    image: Option<SavedImage>,
    disk_generation: u64,
    disk_counter: u64,
}

#[derive(Default)]
struct Inner {
    files: BTreeMap<MachineId, Files>,
    snapshots: BTreeMap<SnapshotId, snapshots::Saved>,
    live: HashMap<ExecutionId, Arc<SimulatedExecution>>,
    ports: HashMap<u16, SocketAddr>,
    parked: HashMap<MachineId, CancellationToken>,
    agent: Option<PathBuf>,
    n_boots: u64,
    n_restores: u64,
    n_forks: u64,
    violations: Vec<String>,
}

/// A simulated host.
#[derive(Default)]
pub struct SimulatedHost {
    inner: Mutex<Inner>,
    faults: Faults,
}

impl SimulatedHost {
    /// A host with the template `base` and nothing else.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What is injected.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Guests answer connections to `port` with whatever listens at `address`.
    pub fn serve(&self, port: u16, address: SocketAddr) {
        self.lock().ports.insert(port, address);
    }

    /// Guests have the real agent that listens at this path, and keep it over pauses; connections end with their
    /// execution.
    pub fn run_agent(&self, socket: &Path) {
        self.lock().agent = Some(socket.to_owned());
    }

    /// Number of boots that were asked for.
    #[must_use]
    pub fn n_boots(&self) -> u64 {
        self.lock().n_boots
    }

    /// Number of restores that were asked for.
    #[must_use]
    pub fn n_restores(&self) -> u64 {
        self.lock().n_restores
    }

    /// Live executions of a machine.
    #[must_use]
    pub fn live(&self, machine: &MachineId) -> Vec<Arc<SimulatedExecution>> {
        let inner = self.lock();
        inner
            .live
            .values()
            .filter(|execution| execution.machine() == machine)
            .cloned()
            .collect()
    }

    /// Machines that have a directory.
    #[must_use]
    pub fn machines_with_files(&self) -> Vec<MachineId> {
        self.lock().files.keys().cloned().collect()
    }

    /// Machines whose network is kept while they sleep.
    #[must_use]
    pub fn n_parked(&self) -> usize {
        self.lock().parked.len()
    }

    /// Give up every network that is kept.
    pub fn lose_parked(&self) {
        for (_, lost) in self.lock().parked.drain() {
            lost.cancel();
        }
    }

    /// What was done that must not be.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Flip a bit of the machine's image.
    pub fn damage_image(&self, machine: &MachineId) {
        if let Some(image) = self
            .lock()
            .files
            .get_mut(machine)
            .and_then(|files| files.image.as_mut())
        {
            image.corrupt = true;
        }
    }

    /// The power fails: every VMM is gone, the files are as they were.
    pub fn cut_power(&self) {
        let gone = std::mem::take(&mut self.lock().live);
        for execution in gone.into_values() {
            execution.vanish();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(self: &Arc<Self>, machine: &MachineId, id: &ExecutionId, memory: Memory) -> Arc<dyn Execution> {
        let execution = SimulatedExecution::new(id.clone(), machine.clone(), memory, Arc::clone(self));
        let mut inner = self.lock();
        if let Some(other) = inner.live.values().find(|other| other.machine() == machine) {
            let violation = format!("{id} of {machine} was started beside {}", other.id());
            inner.violations.push(violation);
        }
        inner.parked.remove(machine);
        inner.live.insert(id.clone(), Arc::clone(&execution));
        execution
    }
}

/// The host as torpord sees it; a wrapper, because executions hold the host, too.
pub struct SimulatedHypervisor(pub Arc<SimulatedHost>);

#[async_trait]
impl Hypervisor for SimulatedHypervisor {
    /// Nothing is kept ready.
    fn pools(&self) -> Pools {
        Pools::default()
    }

    async fn boot(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
    ) -> Result<Arc<dyn Execution>, HypervisorError> {
        let disk_generation = {
            let mut inner = self.0.lock();
            inner.n_boots += 1;
            let files = inner.files.entry(machine.id.clone()).or_default();
            files.image = None;
            files.disk_generation
        };
        self.0.faults.reach(Point::Boot).await?;
        Ok(self.0.start(
            &machine.id,
            execution,
            Memory {
                counter: 0,
                disk_generation,
            },
        ))
    }

    async fn restore(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
        generation: u64,
        _first_port: Option<u16>,
    ) -> Result<(Arc<dyn Execution>, WakeStages), HypervisorError> {
        self.0.lock().n_restores += 1;
        self.0.faults.reach(Point::Restore).await?;
        let memory = {
            let mut inner = self.0.lock();
            let corrupt = |what: &str| {
                let message = format!("cannot restore {}: {what}", machine.id);
                Err(HypervisorError::new(ErrorCode::ImageCorrupt, message))
            };
            let Some(files) = inner.files.get(&machine.id) else {
                return corrupt("no files");
            };
            match &files.image {
                None => return corrupt("no image"),
                Some(image) if image.corrupt => return corrupt("a checksum is wrong"),
                Some(image) if image.generation != generation => return corrupt("another generation"),
                Some(image) if image.memory.disk_generation != files.disk_generation => {
                    return corrupt("the disk is newer");
                }
                Some(image) => {
                    let (memory, fork) = (image.memory, image.fork);
                    inner.n_forks += u64::from(fork);
                    memory
                }
            }
        };
        let stages = WakeStages {
            vmm_ready_us: 100,
            restored_us: 900,
            resynced_us: 1200,
            from: WokenFrom::Image,
            vmm: RestoreTrace {
                state_loaded_us: 300,
                memory_ready_us: 600,
                running_us: 800,
                prefetched_pages: 7,
                ..RestoreTrace::default()
            },
        };
        Ok((self.0.start(&machine.id, execution, memory), stages))
    }

    async fn adopt(&self) -> Vec<Adopted> {
        let live: Vec<_> = self.0.lock().live.values().cloned().collect();
        live.into_iter()
            .filter(|execution| execution.state() != VmmState::Exited)
            .map(|execution| Adopted {
                machine: execution.machine().clone(),
                state: execution.state(),
                execution,
            })
            .collect()
    }

    async fn inspect_image(&self, machine: &MachineId) -> ImageState {
        let inner = self.0.lock();
        let Some(files) = inner.files.get(machine) else {
            return ImageState::None;
        };
        match &files.image {
            None => ImageState::None,
            Some(image) if image.corrupt => ImageState::Corrupt {
                message: "a checksum is wrong".to_owned(),
            },
            Some(image) if image.memory.disk_generation != files.disk_generation => ImageState::Stale {
                generation: image.generation,
            },
            Some(image) => ImageState::Valid {
                generation: image.generation,
            },
        }
    }

    fn unpark(&self, machine: &MachineId) {
        self.0.lock().parked.remove(machine);
    }

    async fn delete_files(&self, machine: &MachineId) -> Result<(), HypervisorError> {
        self.0.faults.reach(Point::DeleteFiles).await?;
        let mut inner = self.0.lock();
        if inner
            .live
            .values()
            .any(|execution| execution.machine() == machine)
        {
            inner
                .violations
                .push(format!("files of {machine} were deleted under a live execution"));
        }
        inner.files.remove(machine);
        Ok(())
    }

    async fn stage_snapshot(
        &self,
        machine: &MachineSpec,
        generation: u64,
        snapshot: &SnapshotId,
    ) -> Result<(), HypervisorError> {
        self.0.stage_snapshot(machine, generation, snapshot).await
    }

    async fn commit_snapshot(&self, snapshot: &SnapshotId) -> Result<u64, HypervisorError> {
        self.0.commit_snapshot(snapshot).await
    }

    async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), HypervisorError> {
        self.0.delete_snapshot(snapshot).await
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotId>, HypervisorError> {
        Ok(self.0.committed_snapshots())
    }

    async fn clone_snapshot(
        &self,
        snapshot: &SnapshotId,
        machine: &MachineSpec,
    ) -> Result<u64, HypervisorError> {
        self.0.clone_snapshot(snapshot, machine).await
    }

    async fn console_tail(&self, machine: &MachineId, max_bytes: u64) -> Result<Vec<u8>, HypervisorError> {
        let text = format!("console of {machine}\n").into_bytes();
        let kept = usize::try_from(max_bytes).unwrap_or(usize::MAX).min(text.len());
        Ok(text[text.len() - kept..].to_vec())
    }

    async fn template(&self, name: &str) -> Option<TemplateInfo> {
        self.templates()
            .await
            .into_iter()
            .find(|template| template.name == name)
    }

    async fn templates(&self) -> Vec<TemplateInfo> {
        vec![TemplateInfo {
            name: "base".to_owned(),
            digest: "sha256:0".to_owned(),
            disk_mib: 512,
            description: "Simulated.".to_owned(),
            env: BTreeMap::new(),
            cwd: None,
            entrypoint: Vec::new(),
        }]
    }
}
