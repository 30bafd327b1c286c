//! What the lifecycle asks of the platform: executions of machines, and their files on disk.
//!
//! Owns the two traits between `machine/` and whatever runs virtual machines, and the values that pass through
//! them. [`crate::execution`] implements them with VMM processes, `crate::machine::simulated` without.
//! Contract for implementations, beyond the comments of each method:
//!
//! * Dropping a future of [`Hypervisor::boot`] or [`Hypervisor::restore`] gives everything back that it took:
//!   process, slot, run directory. (Drop guards; the clean-up itself may go on in a task.)
//! * Futures of [`Execution::freeze`] and [`Execution::persist`] may be dropped at any await; a
//!   [`Execution::run`] that follows brings the guest back whatever they had reached.
//! * When a call fails because the VMM died, [`Execution::exited`] says so, too.
//! * No method polls or sleeps; none decides policy.
//!
//! Not its job: leases, waking, rows. It knows no store.

use super::usage::RunUsage;
use crate::guest_client::GuestClient;
use async_trait::async_trait;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use torpor_api::http::Pools;
use torpor_api::vmm::{Counters, ExitReason, PersistStats, RestoreTrace, VmmState};
use torpor_api::{ErrorCode, ExecutionId, MachineId, SnapshotId};

/// What must be known of a machine to run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    /// Its identity, and the name of its directory.
    pub id: MachineId,
    /// The template it was made from.
    pub template: String,
    /// The template's digest when it was made; another digest today refuses boot and restore.
    pub template_digest: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub mem_mib: u32,
    /// Size of the disk in MiB.
    pub disk_mib: u32,
}

/// A template on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateInfo {
    /// Its name, which is its directory's.
    pub name: String,
    /// What binds machines to exactly this kernel and root disk.
    pub digest: String,
    /// Size of its root disk in MiB.
    pub disk_mib: u32,
    /// What it holds, for people.
    pub description: String,
    /// Environment of its machines' commands, unless they say otherwise.
    pub env: BTreeMap<String, String>,
    /// Their working directory, likewise.
    pub cwd: Option<String>,
    /// What a machine runs in the background once it has booted for the first time.
    pub entrypoint: Vec<String>,
}

/// The hibernation image of a machine, judged by header, manifest and disk generation alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageState {
    /// There is none.
    None,
    /// Complete, and the disk has not been written since.
    Valid {
        /// Generation in the manifest.
        generation: u64,
    },
    /// Complete, and the disk is newer: never to be resumed.
    Stale {
        /// Generation in the manifest.
        generation: u64,
    },
    /// Cut short, damaged, or its parts disagree.
    Corrupt {
        /// Which part, and how.
        message: String,
    },
}

/// A freeze that worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FreezeTrace {
    /// Spent in the guest, which still ran, to bring its file systems to rest; in microseconds.
    pub quiesce_us: u64,
    /// From the freeze request to the last vCPU stopped and the devices still, in microseconds.
    pub freeze_us: u64,
}

/// A frozen guest that runs again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ran {
    /// A persist was under way and was ended.
    pub persist_cancelled: bool,
    /// From the request to the vCPUs released, in microseconds.
    pub run_us: u64,
}

/// What was there of a machine that was woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WokenFrom {
    /// Its files.
    #[default]
    Image,
    /// The VMM of the execution before, with its image laid out under it.
    Dozing,
    /// That VMM, with all its memory.
    Resident,
}

impl WokenFrom {
    /// As it stands in events and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Dozing => "dozing",
            Self::Resident => "resident",
        }
    }
}

/// A restore that worked: where its time went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WakeStages {
    /// From the call to a prepared VMM process with its slot in hand, in microseconds.
    pub vmm_ready_us: u64,
    /// From the call to the restore's reply, in microseconds.
    pub restored_us: u64,
    /// From the call to the guest agent's acknowledgement of clock and entropy, in microseconds.
    pub resynced_us: u64,
    /// What was there of the machine.
    pub from: WokenFrom,
    /// What the VMM tells of the restore.
    pub vmm: RestoreTrace,
}

/// Figures of a live execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmStatus {
    /// Where the VMM stands.
    pub state: VmmState,
    /// The last persist that this process completed.
    pub persisted: Option<PersistStats>,
    /// Counters.
    pub counters: Counters,
}

/// An execution that was found running when torpord started.
pub struct Adopted {
    /// The machine that it says it runs.
    pub machine: MachineId,
    /// Where its VMM stands.
    pub state: VmmState,
    /// The way to it.
    pub execution: Arc<dyn Execution>,
}

/// Why the platform could not. Clonable, because one outcome answers every waiter.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct HypervisorError {
    /// What the caller of the API gets to see.
    pub code: ErrorCode,
    /// Operation and operands.
    pub message: String,
    /// The cause.
    #[source]
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl HypervisorError {
    /// An error without a cause.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            source: None,
        }
    }

    /// The same error with its cause.
    #[must_use]
    pub fn because(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// The memory in the image will never come back, however often it is tried: damaged, or made elsewhere.
    #[must_use]
    pub fn refuses_image(&self) -> bool {
        matches!(self.code, ErrorCode::ImageCorrupt | ErrorCode::ImageIncompatible)
    }
}

/// Why there is no connection to a port of the guest.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// The guest answered that nothing listens.
    #[error("guest port {port} refuses connections")]
    Refused {
        /// Port.
        port: u16,
    },
    /// The guest did not answer within the platform's bound.
    #[error("guest port {port} does not answer")]
    TimedOut {
        /// Port.
        port: u16,
    },
    /// The host could not even ask.
    #[error("cannot connect to guest port {port}: {message}")]
    Unreachable {
        /// Port.
        port: u16,
        /// Why.
        message: String,
    },
}

/// Runs machines on this host.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// Boot from disk: give up the hibernation image first (manifest removed, durably, so that old memory can
    /// never come back over this boot), make the overlay if it is missing, start the VMM, and answer when the
    /// guest agent answers a ping. Errors: `boot_failed`, `disk_full`, `capacity_exceeded`, `template_not_found`.
    async fn boot(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
    ) -> Result<Arc<dyn Execution>, HypervisorError>;

    /// Restore from the image, whose manifest must name exactly `generation`; answer when the vCPUs run and the
    /// guest agent acknowledged clock and entropy. Errors: `image_corrupt` and `incompatible_snapshot` before
    /// the guest ran, else `machine_resume_failed` or `capacity_exceeded`; the image is unharmed by all of them.
    /// A connection to `first_port` will be asked for first and may be attempted beside the restore.
    async fn restore(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
        generation: u64,
        first_port: Option<u16>,
    ) -> Result<(Arc<dyn Execution>, WakeStages), HypervisorError>;

    /// Called once, at start: every VMM that still answers under the run directory. What does not answer is
    /// cleaned away (slot scrubbed, directory removed) before this returns.
    async fn adopt(&self) -> Vec<Adopted>;

    /// The machine's image by header, manifest and `disk.gen`; reads a few KiB at most.
    async fn inspect_image(&self, machine: &MachineId) -> ImageState;

    /// Remove the machine's directory and everything in it. No directory is no error.
    async fn delete_files(&self, machine: &MachineId) -> Result<(), HypervisorError>;

    /// Put the files of a snapshot of this machine in place, out of its image, whose manifest must name exactly
    /// `generation`, and its disk. The machine stands still or sleeps until this answers. Nobody sees the snapshot
    /// before [`Hypervisor::commit_snapshot`]; dropping the future leaves something that
    /// [`Hypervisor::delete_snapshot`] and the next start remove. Errors: `image_corrupt`, `disk_full`,
    /// `snapshot_failed`.
    async fn stage_snapshot(
        &self,
        machine: &MachineSpec,
        generation: u64,
        snapshot: &SnapshotId,
    ) -> Result<(), HypervisorError>;

    /// Make a staged snapshot durable, all of it or nothing; answers the room that it takes in bytes.
    async fn commit_snapshot(&self, snapshot: &SnapshotId) -> Result<u64, HypervisorError>;

    /// Remove a snapshot, staged or committed. None is no error. Machines that were made from it keep what they
    /// have of it.
    async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), HypervisorError>;

    /// Called once, at start: every committed snapshot. What was staged and never committed is removed.
    async fn snapshots(&self) -> Result<Vec<SnapshotId>, HypervisorError>;

    /// Make the files of a machine that goes on where the snapshot was taken: its image is the snapshot's, and a
    /// restore of it makes the guest another one. Answers the image's generation. Errors: `snapshot_not_found`,
    /// `image_corrupt`, `incompatible_snapshot`, `disk_full`.
    async fn clone_snapshot(
        &self,
        snapshot: &SnapshotId,
        machine: &MachineSpec,
    ) -> Result<u64, HypervisorError>;

    /// Give up what [`Execution::quit_parked`] kept for the machine, if anything.
    fn unpark(&self, machine: &MachineId) {
        let _ = machine;
    }

    /// The last `max_bytes` of the machine's console; empty if it never ran.
    async fn console_tail(&self, machine: &MachineId, max_bytes: u64) -> Result<Vec<u8>, HypervisorError>;

    /// The template of this name. The name is hostile input.
    async fn template(&self, name: &str) -> Option<TemplateInfo>;

    /// All templates, by name.
    async fn templates(&self) -> Vec<TemplateInfo>;

    /// What is kept ready at this moment.
    fn pools(&self) -> Pools;
}

/// One live run of a machine.
#[async_trait]
pub trait Execution: Send + Sync + 'static {
    /// Its ID.
    fn id(&self) -> &ExecutionId;

    /// Quiesce the guest within a short bound (going on without it if it does not answer), then stop the vCPUs.
    /// On an error the guest runs, or the VMM is gone.
    async fn freeze(&self) -> Result<FreezeTrace, HypervisorError>;

    /// Have what the running guest has changed written to the image now, so that the next persist has less to write;
    /// answers when that has begun. Best effort. No snapshot may be taken of the machine meanwhile.
    async fn pre_copy(&self) -> Result<(), HypervisorError>;

    /// Write the frozen machine out as `generation`; answers when the image is durable and the manifest renamed
    /// in. On an error (`disk_full`, `pause_failed`) the guest runs again, or the VMM is gone.
    async fn persist(&self, generation: u64) -> Result<PersistStats, HypervisorError>;

    /// Run a guest that may be frozen, persisting, durable or running already.
    async fn run(&self) -> Result<Ran, HypervisorError>;

    /// End the VMM, give its slot back, remove its run directory. Answers when the machine's files are no longer
    /// open. Can be called again, and after the VMM died.
    async fn quit(&self);

    /// Likewise, but keep the network as the guest knows it for the machine's next restore, so that connections
    /// live on. Answers whether it is kept; `lost` is cancelled if it is given up before that restore.
    async fn quit_parked(&self, lost: CancellationToken) -> bool {
        let _ = lost;
        self.quit().await;
        false
    }

    /// Leave the VMM of a machine that was paused as it is, for the machine's next restore. Answers whether that is done; if
    /// not, it has to be ended.
    fn stay(self: Arc<Self>) -> bool {
        false
    }

    /// Becomes `Some` when the guest ended or the VMM is gone.
    fn exited(&self) -> watch::Receiver<Option<ExitReason>>;

    /// A TCP connection to the guest, made inside its slot.
    async fn connect(&self, port: u16) -> Result<TcpStream, ConnectError>;

    /// The way to the agent inside the guest.
    fn guest(&self) -> GuestClient;

    /// The first response byte left: the working set is complete. Best effort.
    async fn first_byte(&self);

    /// What the run has used so far.
    async fn usage(&self) -> RunUsage;

    /// State and counters of the VMM.
    async fn status(&self) -> Result<VmmStatus, HypervisorError>;
}

impl fmt::Debug for dyn Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Execution").field(&self.id().as_str()).finish()
    }
}

/// Settings of the platform, from torpord's configuration.
#[derive(Debug, Clone)]
pub struct PlatformConfig {
    /// `/var/lib/torpor`.
    pub state_dir: PathBuf,
    /// `/run/torpor`.
    pub run_dir: PathBuf,
    /// Where templates are looked for, first match wins.
    pub template_dirs: Vec<PathBuf>,
    /// The VMM's executable.
    pub vmm_path: PathBuf,
    /// Longest time from a boot request to the guest agent's first answer.
    pub boot_timeout: std::time::Duration,
    /// Largest console log in bytes.
    pub console_limit_bytes: u64,
    /// Most executions at a time.
    pub max_slots: u16,
    /// Most machines whose network is kept while they sleep, because clients have connections open.
    pub max_parked: u16,
    /// Blank VMMs kept ready for each shape in recent use.
    pub blank_vmms: u8,
    /// Machines that keep their VMM while they sleep.
    pub sleepers: SleeperLimits,
}

/// How many machines may keep their VMM while they sleep, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct SleeperLimits {
    /// Guest memory of all that keep it, in MiB.
    pub resident_mem_mib: u64,
    /// How long they keep it.
    pub resident_for: std::time::Duration,
    /// Machines that keep only their VMM.
    pub dozing: u16,
}
