//! One live execution: a VMM process that runs a machine, and everything that is done to it.
//!
//! One task per execution reads the VMM's events; it ends with the VMM and then says so in
//! [`Execution::exited`]. A VMM whose connection broke is ended, because one that can't be controlled must not
//! keep a disk that another may be given. Every persist has an attempt number; a run raises it, so a persist that
//! was overtaken can never put a manifest in place.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use torpor_api::vmm::{Event, ExitReason, PersistStats, VmmError, VmmErrorCode, VmmState};
use torpor_api::{ErrorCode, ExecutionId};

use super::claim::Claim;
use super::parking::Parking;
use super::process::Process;
use super::record::{MachineRecord, RunDir, RunDirError};
use super::sleepers::Sleepers;
use super::{blocking, images_error};
use crate::guest_client::GuestClient;
use crate::images::manifest::{FORMAT, Manifest};
use crate::images::memory::OpenImage;
use crate::images::{MachineFiles, header};
use crate::machine::hypervisor::{ConnectError, Execution, FreezeTrace, HypervisorError, Ran, VmmStatus};
use crate::machine::usage::RunUsage;
use crate::net::SlotLease;
use crate::vmm_client::{VmmClient, VmmClientError, VmmEvents};

/// Longest wait for the guest's file systems to come to rest before a freeze.
const QUIESCE_LIMIT: Duration = Duration::from_secs(2);
/// How long a VMM that was told to end, or lost its connection, may take before it is killed.
const END_GRACE: Duration = Duration::from_secs(2);

/// Where the current attempt to persist stands.
#[derive(Debug, Clone, Default)]
struct Attempt {
    number: u64,
    generation: u64,
    outcome: Option<Result<PersistStats, VmmError>>,
}

/// Everything that an execution owns, from its start or from its adoption.
pub(super) struct Holdings {
    pub(super) record: MachineRecord,
    pub(super) dir: RunDir,
    pub(super) process: Process,
    pub(super) client: VmmClient,
    pub(super) events: VmmEvents,
    pub(super) files: MachineFiles,
    /// Absent if it was lost while torpord was away.
    pub(super) slot: Option<Arc<SlotLease>>,
    pub(super) parking: Arc<Parking>,
    pub(super) sleepers: Arc<Sleepers>,
    pub(super) claim: Claim,
}

/// A VMM that runs a machine.
pub(super) struct VmmExecution {
    /// As it was started; later executions in the same VMM have other IDs.
    record: MachineRecord,
    /// Under the name of the current execution.
    dir: Mutex<RunDir>,
    process: Process,
    client: VmmClient,
    files: MachineFiles,
    slot: Mutex<Option<Arc<SlotLease>>>,
    parking: Arc<Parking>,
    sleepers: Arc<Sleepers>,
    /// Given back when the process has ended.
    claim: Mutex<Option<Claim>>,
    exited: watch::Sender<Option<ExitReason>>,
    attempt: watch::Sender<Attempt>,
    /// A connection that was begun beside the restore, for the first who wants this port.
    early: Mutex<Option<(u16, EarlyConnection)>>,
}

type EarlyConnection = tokio::task::JoinHandle<Result<TcpStream, ConnectError>>;

impl VmmExecution {
    /// Make an execution of them, and follow its VMM until it is gone.
    pub(super) fn start(holdings: Holdings) -> Arc<Self> {
        let execution = Arc::new(Self {
            record: holdings.record,
            dir: Mutex::new(holdings.dir),
            process: holdings.process,
            client: holdings.client,
            files: holdings.files,
            slot: Mutex::new(holdings.slot),
            parking: holdings.parking,
            sleepers: holdings.sleepers,
            claim: Mutex::new(Some(holdings.claim)),
            exited: watch::Sender::new(None),
            attempt: watch::Sender::default(),
            early: Mutex::new(None),
        });
        execution.watch(holdings.events);
        execution
    }

    fn watch(self: &Arc<Self>, mut events: VmmEvents) {
        let execution = self.clone();
        tokio::spawn(async move {
            let mut reason = None;
            while let Some(event) = events.next().await {
                match event {
                    Event::PersistDone { stats } => execution.persist_ended(Ok(stats)),
                    Event::PersistFailed { error } => execution.persist_ended(Err(error)),
                    Event::Exited { reason: how } => reason = Some(how),
                }
            }
            execution.gone(reason).await;
        });
    }

    /// Begin a connection to the guest before it runs: its first SYN waits in the tap.
    pub(super) fn connect_early(&self, port: u16) {
        let Some(slot) = self.slot() else { return };
        let connection = tokio::spawn(async move { slot.connect(port).await });
        *self.early.lock().unwrap_or_else(PoisonError::into_inner) = Some((port, connection));
    }

    fn take_early(&self, port: u16) -> Option<EarlyConnection> {
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        early
            .take_if(|(wanted, _)| *wanted == port)
            .map(|(_, connection)| connection)
    }

    pub(super) fn client(&self) -> &VmmClient {
        &self.client
    }

    pub(super) fn record(&self) -> &MachineRecord {
        &self.record
    }

    fn dir(&self) -> RunDir {
        self.dir.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From here on this is another execution of the machine: a restarted torpord finds it under that name.
    pub(super) fn rename(&self, execution: &ExecutionId) -> Result<(), RunDirError> {
        let record = MachineRecord {
            execution_id: execution.clone(),
            ..self.record.clone()
        };
        let mut dir = self.dir.lock().unwrap_or_else(PoisonError::into_inner);
        dir.claim(self.process.id(), record)
    }

    /// Whether the VMM is alive and stands where this generation of its image was made.
    pub(super) fn is_durable_as(&self, generation: u64) -> bool {
        let attempt = self.attempt.borrow();
        let is_durable = attempt.generation == generation && matches!(attempt.outcome, Some(Ok(_)));
        is_durable && self.exited.borrow().is_none()
    }

    fn persist_ended(&self, outcome: Result<PersistStats, VmmError>) {
        self.attempt.send_if_modified(|attempt| {
            let is_current = match &outcome {
                Ok(stats) => stats.generation == attempt.generation,
                // A persist that a run ended; the run has said so itself.
                Err(error) => error.code != VmmErrorCode::Cancelled,
            };
            if is_current {
                attempt.outcome = Some(outcome);
            }
            is_current
        });
    }

    async fn gone(&self, reason: Option<ExitReason>) {
        self.end_process().await;
        let reason = reason.unwrap_or_else(|| ExitReason::Failed {
            message: format!(
                "VMM ended without a word (its log ends: {:?})",
                self.dir().log_tail()
            ),
        });
        tracing::info!(execution_id = %self.record.execution_id, machine_id = %self.record.machine_id, ?reason,
            "VMM is gone");
        self.persist_ended(Err(VmmError {
            code: VmmErrorCode::Io,
            message: "the VMM is gone".to_owned(),
        }));
        self.exited.send_replace(Some(reason));
    }

    /// Wait for the process, and help it along if it takes too long.
    async fn end_process(&self) {
        if tokio::time::timeout(END_GRACE, self.process.ended())
            .await
            .is_err()
        {
            tracing::warn!(execution_id = %self.record.execution_id, "VMM did not end by itself, killing it");
            self.process.kill();
            self.process.ended().await;
        }
        let files = self.files.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || files.drop_spent_images()).await {
            tracing::warn!(%error, "image that nobody reads any more not removed");
        }
        self.claim.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Begin an attempt; whatever was under way is overtaken.
    fn next_attempt(&self, generation: u64) -> u64 {
        let mut number = 0;
        self.attempt.send_modify(|attempt| {
            number = attempt.number + 1;
            *attempt = Attempt {
                number,
                generation,
                outcome: None,
            };
        });
        number
    }

    async fn open_image(&self) -> Result<OpenImage, HypervisorError> {
        let files = self.files.clone();
        blocking(ErrorCode::PauseFailed, move || {
            let image = files.open_image_for_persist();
            image.map_err(images_error(
                ErrorCode::PauseFailed,
                "cannot open the memory image",
            ))
        })
        .await
    }

    async fn persist_attempt(&self, number: u64, generation: u64) -> Result<PersistStats, HypervisorError> {
        let image = self.open_image().await?;
        let fds: Vec<_> = image.fds().collect();
        let begun = self.client.persist(generation, &fds).await;
        begun.map_err(|error| vmm_failed(ErrorCode::PauseFailed, "VMM cannot persist", error))?;
        let mut attempts = self.attempt.subscribe();
        let ended = attempts.wait_for(|attempt| attempt.number != number || attempt.outcome.is_some());
        // The sender lives in self.
        let outcome = ended.await.ok().filter(|attempt| attempt.number == number);
        match outcome.and_then(|attempt| attempt.outcome.clone()) {
            Some(Ok(stats)) => {
                self.write_manifest(number, stats).await?;
                Ok(stats)
            }
            Some(Err(error)) => {
                let code = match error.code {
                    VmmErrorCode::DiskFull => ErrorCode::DiskFull,
                    _ => ErrorCode::PauseFailed,
                };
                Err(HypervisorError::new(code, "the image could not be written").because(error))
            }
            None => Err(HypervisorError::new(
                ErrorCode::PauseFailed,
                "a run overtook the persist",
            )),
        }
    }

    async fn write_manifest(&self, number: u64, stats: PersistStats) -> Result<(), HypervisorError> {
        let (files, record, attempt) = (self.files.clone(), self.record.clone(), self.attempt.subscribe());
        blocking(ErrorCode::PauseFailed, move || {
            // A run may have overtaken this while it waited for its thread.
            if attempt.borrow().number != number {
                return Err(HypervisorError::new(
                    ErrorCode::PauseFailed,
                    "a run overtook the persist",
                ));
            }
            put_manifest(&files, &record, stats)
        })
        .await
    }

    /// Have the VMM of the sleeping machine give its memory back and lay out the image that it stands at.
    pub(super) async fn doze(&self) -> Result<(), HypervisorError> {
        let generation = self.attempt.borrow().generation;
        let files = self.files.clone();
        let failed = "cannot open the memory image";
        let opened = blocking(ErrorCode::Internal, move || {
            files
                .open_image()
                .map_err(images_error(ErrorCode::Internal, failed))
        });
        let image = opened.await?;
        let fds: Vec<_> = image.fds().collect();
        let dozes = self.client.doze(generation, &fds).await;
        dozes.map_err(|error| vmm_failed(ErrorCode::Internal, "VMM cannot give its memory back", error))
    }

    /// End the VMM; answers when the machine's files are no longer open.
    async fn end(&self) {
        let early = self.early.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((_, connection)) = early {
            connection.abort();
        }
        match tokio::time::timeout(END_GRACE, self.client.quit()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error = super::chain(&error), "VMM refuses to quit"),
            Err(_) => tracing::warn!(execution_id = %self.record.execution_id, "VMM does not answer a quit"),
        }
        self.end_process().await;
    }

    async fn remove_dir(&self) {
        let dir = self.dir();
        if let Err(error) = tokio::task::spawn_blocking(move || dir.remove()).await {
            tracing::warn!(%error, "run directory not removed");
        }
    }

    fn slot(&self) -> Option<Arc<SlotLease>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Make the image that `stats` tells of the one to wake from.
pub(super) fn put_manifest(
    files: &MachineFiles,
    record: &MachineRecord,
    stats: PersistStats,
) -> Result<(), HypervisorError> {
    let failed = |message: &str| HypervisorError::new(ErrorCode::PauseFailed, message);
    files.promote_image(stats.generation).map_err(images_error(
        ErrorCode::PauseFailed,
        "cannot put the image in place",
    ))?;
    let header = header::read(&files.image_path())
        .map_err(|error| failed("cannot read back the image's header").because(error))?;
    let found = (header.valid, header.generation, header.disk_generation);
    if found != (true, stats.generation, stats.disk_generation) {
        return Err(failed(&format!(
            "image has {found:?} in its header, VMM reported {stats:?}"
        )));
    }
    let written = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let manifest = Manifest {
        format: FORMAT,
        machine_id: record.machine_id.clone(),
        generation: stats.generation,
        disk_generation: stats.disk_generation,
        shape: record.shape,
        template: record.template.clone(),
        template_digest: record.template_digest.clone(),
        written_unix_ms: written.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)),
        fork: false,
        host_signature: header.host_signature,
    };
    let put = files.write_manifest(&manifest);
    put.map_err(images_error(
        ErrorCode::PauseFailed,
        "cannot put the manifest in place",
    ))
}

fn vmm_failed(code: ErrorCode, message: &str, error: VmmClientError) -> HypervisorError {
    let code = match &error {
        VmmClientError::Refused { source, .. } if source.code == VmmErrorCode::DiskFull => {
            ErrorCode::DiskFull
        }
        _ => code,
    };
    HypervisorError::new(code, message).because(error)
}

#[async_trait]
impl Execution for VmmExecution {
    fn id(&self) -> &ExecutionId {
        &self.record.execution_id
    }

    async fn freeze(&self) -> Result<FreezeTrace, HypervisorError> {
        let begun = Instant::now();
        if let Err(error) = self.guest().quiesce(QUIESCE_LIMIT).await {
            let error = super::chain(&error);
            tracing::warn!(execution_id = %self.record.execution_id, error, "freezing without a flush in the guest");
        }
        let quiesce_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let frozen = self.client.freeze().await;
        let freeze_us =
            frozen.map_err(|error| vmm_failed(ErrorCode::PauseFailed, "VMM cannot freeze", error))?;
        Ok(FreezeTrace {
            quiesce_us,
            freeze_us,
        })
    }

    async fn pre_copy(&self) -> Result<(), HypervisorError> {
        let image = self.open_image().await?;
        let fds: Vec<_> = image.fds().collect();
        let begun = self.client.pre_copy(&fds).await;
        begun.map_err(|error| vmm_failed(ErrorCode::PauseFailed, "VMM cannot copy ahead", error))
    }

    async fn persist(&self, generation: u64) -> Result<PersistStats, HypervisorError> {
        let number = self.next_attempt(generation);
        let persisted = self.persist_attempt(number, generation).await;
        if persisted.is_err() && self.attempt.borrow().number == number {
            // Unless the VMM has done so already, and whatever of ours failed after it.
            if let Err(error) = self.client.run().await {
                tracing::debug!(
                    error = super::chain(&error),
                    "guest was not frozen after a failed persist"
                );
            }
        }
        persisted
    }

    async fn run(&self) -> Result<Ran, HypervisorError> {
        self.next_attempt(0);
        let failed = |error| vmm_failed(ErrorCode::ResumeFailed, "VMM cannot run the guest again", error);
        match self.client.run().await {
            Ok(report) => Ok(Ran {
                persist_cancelled: report.persist_cancelled,
                run_us: report.run_us,
            }),
            Err(error @ VmmClientError::Refused { .. }) => {
                let status = self.client.status().await.map_err(failed)?;
                if status.state == VmmState::Running {
                    Ok(Ran::default())
                } else {
                    Err(failed(error))
                }
            }
            Err(error) => Err(failed(error)),
        }
    }

    async fn quit(&self) {
        let slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.end().await;
        if let Some(slot) = slot {
            slot.release();
        }
        self.remove_dir().await;
    }

    async fn quit_parked(&self, lost: CancellationToken) -> bool {
        let slot = self.slot().filter(|slot| slot.has_tap());
        let Some(slot) = slot else {
            self.quit().await;
            return false;
        };
        self.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.end().await;
        self.remove_dir().await;
        self.parking.park(self.record.machine_id.clone(), slot, lost);
        true
    }

    fn stay(self: Arc<Self>) -> bool {
        let sleepers = Arc::clone(&self.sleepers);
        sleepers.keep(self)
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exited.subscribe()
    }

    async fn connect(&self, port: u16) -> Result<TcpStream, ConnectError> {
        if let Some(early) = self.take_early(port)
            && let Ok(Ok(stream)) = early.await
        {
            return Ok(stream);
        }
        match self.slot() {
            Some(slot) => slot.connect(port).await,
            None => Err(ConnectError::Unreachable {
                port,
                message: "the execution has no network slot".to_owned(),
            }),
        }
    }

    fn guest(&self) -> GuestClient {
        GuestClient::new(&self.dir().vsock_socket())
    }

    async fn first_byte(&self) {
        if let Err(error) = self.client.first_byte().await {
            tracing::debug!(error = super::chain(&error), "VMM was not told of the first byte");
        }
    }

    async fn usage(&self) -> RunUsage {
        RunUsage {
            cpu_us: self.process.cpu_us().unwrap_or(0),
            outbound_bytes: self.slot().map_or(0, |slot| slot.uplink_bytes()),
        }
    }

    async fn status(&self) -> Result<VmmStatus, HypervisorError> {
        let status = self.client.status().await;
        let status =
            status.map_err(|error| vmm_failed(ErrorCode::Internal, "VMM does not tell its status", error))?;
        Ok(VmmStatus {
            state: status.state,
            persisted: status.persisted,
            counters: status.counters,
        })
    }
}
