//! Executions: running machines as VMM processes that outlive torpord.
//!
//! ```text
//!  boot/restore:  blank pool --VMM--+--> run directory named, recorded --Boot|Restore--> live execution
//!                 slot pool --slot--+
//! ```
//! [`Platform`] implements [`Hypervisor`]. Its tasks: one per live execution that watches its VMM ([`live`]), one
//! that refills the pool of blank VMMs ([`blank`]), those of the slot pool. A VMM dies with its guest or by
//! [`Execution::quit`], never with torpord; what torpord needs to know of it after a restart is in its run
//! directory ([`record`]), and [`adopt`] takes it over. Until an execution is live, drop guards own everything
//! that it took.
//!
//! Not its job: when to boot, pause or wake.

mod adopt;
mod blank;
mod claim;
mod live;
mod parking;
pub mod process;
pub mod record;
mod sleepers;
mod snapshots;
mod start;
mod sys;
mod wake;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use torpor_api::http::Pools;
use torpor_api::{ErrorCode, ExecutionId, MachineId, SnapshotId};

use crate::images::template::Templates;
use crate::images::{Images, ImagesError};
use crate::machine::hypervisor::{
    Adopted, Execution, Hypervisor, HypervisorError, ImageState, MachineSpec, PlatformConfig, TemplateInfo,
    WakeStages,
};
use crate::net::{NetConfig, NetError, SlotPool};

pub use blank::BlankConfig;

/// An error and all of its causes, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Why the platform could not be started.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// A directory of ours can't be used.
    #[error("cannot use {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Files of machines can't be reached.
    #[error("cannot open the state directory")]
    Images {
        /// Why not.
        #[source]
        source: ImagesError,
    },
    /// The network can't be set up.
    #[error("cannot set up the network")]
    Net {
        /// Why not.
        #[source]
        source: NetError,
    },
}

/// Runs machines on this host.
pub struct Platform {
    config: PlatformConfig,
    images: Images,
    templates: Templates,
    slots: SlotPool,
    blanks: blank::BlankPool,
    claims: claim::Claims,
    parking: Arc<parking::Parking>,
    sleepers: Arc<sleepers::Sleepers>,
    /// Found at the start, until somebody asks for them.
    adopted: Mutex<Vec<Adopted>>,
}

impl Platform {
    /// Set the host up, take over what runs on it and clean away what does not.
    ///
    /// # Errors
    /// See [`PlatformError`].
    pub async fn start(config: PlatformConfig) -> Result<Arc<Self>, PlatformError> {
        let net = NetConfig::for_host(config.max_slots.saturating_add(config.max_parked));
        let blanks = BlankConfig {
            per_shape: config.blank_vmms.into(),
            ..BlankConfig::default()
        };
        Self::start_with(config, net, blanks).await
    }

    /// Likewise, with a network and a pool of blank VMMs other than the usual.
    ///
    /// # Errors
    /// See [`PlatformError`].
    pub async fn start_with(
        config: PlatformConfig,
        net: NetConfig,
        blanks: BlankConfig,
    ) -> Result<Arc<Self>, PlatformError> {
        let exec_dir = exec_dir(&config.run_dir);
        std::fs::create_dir_all(&exec_dir).map_err(|source| PlatformError::Directory {
            path: exec_dir.clone(),
            source,
        })?;
        let images = Images::open(&config.state_dir).map_err(|source| PlatformError::Images { source })?;
        let found = adopt::find(&exec_dir).await;
        let slots = SlotPool::start(net, &found.slots()).await;
        let slots = slots.map_err(|source| PlatformError::Net { source })?;
        let claims = claim::Claims::default();
        let parking = parking::Parking::new(config.max_parked.into());
        let sleepers = sleepers::Sleepers::new(config.sleepers);
        let adopted = found
            .take_over(&slots, &images, &claims, (&parking, &sleepers))
            .await;
        Ok(Arc::new(Self {
            blanks: blank::BlankPool::new(
                blanks,
                config.vmm_path.clone(),
                exec_dir,
                config.state_dir.join("shapes-in-use.json"),
            ),
            templates: Templates::new(config.template_dirs.clone()),
            adopted: Mutex::new(adopted),
            claims,
            parking,
            sleepers,
            config,
            images,
            slots,
        }))
    }

    /// End what serves no machine that runs: blank VMMs and those of sleeping machines, spare slots. Live executions go on.
    pub async fn stop(&self) {
        while self.sleepers.end_oldest().await {}
        while self.parking.release_oldest() {}
        self.blanks.close().await;
        self.slots.close().await;
    }

    /// The pool of network slots.
    #[must_use]
    pub fn slots(&self) -> &SlotPool {
        &self.slots
    }

    /// Wait until a blank VMM is ready for every shape in recent use.
    pub async fn blanks_settled(&self) {
        self.blanks.settled().await;
    }
}

fn exec_dir(run_dir: &Path) -> PathBuf {
    run_dir.join("exec")
}

/// Run file work on a blocking thread.
async fn blocking<T: Send + 'static>(
    code: ErrorCode,
    work: impl FnOnce() -> Result<T, HypervisorError> + Send + 'static,
) -> Result<T, HypervisorError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(HypervisorError::new(code, "file work was cut short").because(error)),
    }
}

fn images_error(code: ErrorCode, what: impl Into<String>) -> impl FnOnce(ImagesError) -> HypervisorError {
    let what = what.into();
    move |error| {
        let code = if error.is_disk_full() {
            ErrorCode::DiskFull
        } else {
            code
        };
        HypervisorError::new(code, what).because(error)
    }
}

#[async_trait]
impl Hypervisor for Platform {
    async fn boot(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
    ) -> Result<Arc<dyn Execution>, HypervisorError> {
        self.boot_machine(machine, execution).await
    }

    async fn restore(
        &self,
        machine: &MachineSpec,
        execution: &ExecutionId,
        generation: u64,
        first_port: Option<u16>,
    ) -> Result<(Arc<dyn Execution>, WakeStages), HypervisorError> {
        self.restore_machine(machine, execution, generation, first_port)
            .await
    }

    async fn adopt(&self) -> Vec<Adopted> {
        std::mem::take(&mut self.adopted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn inspect_image(&self, machine: &MachineId) -> ImageState {
        let files = self.images.machine(machine);
        let inspected = blocking(ErrorCode::Internal, move || Ok(files.inspect())).await;
        inspected.unwrap_or_else(|error| ImageState::Corrupt {
            message: chain(&error),
        })
    }

    async fn delete_files(&self, machine: &MachineId) -> Result<(), HypervisorError> {
        self.sleepers.end(machine).await;
        // A clone that was given up may still be writing.
        let claim = self.claims.take(machine).await;
        let (images, id) = (self.images.clone(), machine.clone());
        blocking(ErrorCode::Internal, move || {
            let _claim = claim;
            let deleted = images.delete(&id);
            deleted.map_err(images_error(
                ErrorCode::Internal,
                format!("cannot delete the files of {id}"),
            ))
        })
        .await
    }

    async fn stage_snapshot(
        &self,
        machine: &MachineSpec,
        generation: u64,
        snapshot: &SnapshotId,
    ) -> Result<(), HypervisorError> {
        self.stage(machine, generation, snapshot).await
    }

    async fn commit_snapshot(&self, snapshot: &SnapshotId) -> Result<u64, HypervisorError> {
        self.commit(snapshot).await
    }

    async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), HypervisorError> {
        self.remove(snapshot).await
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotId>, HypervisorError> {
        self.committed().await
    }

    async fn clone_snapshot(
        &self,
        snapshot: &SnapshotId,
        machine: &MachineSpec,
    ) -> Result<u64, HypervisorError> {
        self.clone_from(snapshot, machine).await
    }

    async fn console_tail(&self, machine: &MachineId, max_bytes: u64) -> Result<Vec<u8>, HypervisorError> {
        let (files, id) = (self.images.machine(machine), machine.clone());
        blocking(ErrorCode::Internal, move || {
            let tail = files.console_tail(max_bytes);
            tail.map_err(images_error(
                ErrorCode::Internal,
                format!("cannot read the console of {id}"),
            ))
        })
        .await
    }

    fn unpark(&self, machine: &MachineId) {
        self.parking.release(machine);
    }

    async fn template(&self, name: &str) -> Option<TemplateInfo> {
        let (templates, name) = (self.templates.clone(), name.to_owned());
        let found = blocking(ErrorCode::Internal, move || {
            Ok(templates.find(&name).unwrap_or_else(|error| {
                tracing::warn!(error = chain(&error), "template is unusable");
                None
            }))
        });
        found.await.ok().flatten().map(|template| template.info)
    }

    async fn templates(&self) -> Vec<TemplateInfo> {
        let templates = self.templates.clone();
        let all = blocking(ErrorCode::Internal, move || Ok(templates.all()));
        all.await.unwrap_or_default()
    }

    fn pools(&self) -> Pools {
        Pools {
            blank_vmms: self.blanks.counts(),
            slots: self.slots.counts(self.parking.count()),
            sleepers: self.sleepers.counts(),
        }
    }
}
