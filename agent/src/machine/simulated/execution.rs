//! One simulated execution: a state, a counter in memory, a counter on disk.

use super::super::hypervisor::{ConnectError, Execution, FreezeTrace, HypervisorError, Ran, VmmStatus};
use super::guest::{self, RealAgent, SimulatedGuest};
use super::{Memory, Point, SavedImage, SimulatedHost};
use crate::guest_client::GuestClient;
use crate::machine::usage::RunUsage;
use async_trait::async_trait;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use torpor_api::vmm::{Counters, ExitReason, PersistStats, VmmState};
use torpor_api::{ErrorCode, ExecutionId, MachineId};

struct Inner {
    state: VmmState,
    memory: Memory,
    persisted: Option<PersistStats>,
    wrote_disk: bool,
    n_first_bytes: u64,
    n_pre_copies: u64,
    usage: RunUsage,
}

/// A simulated execution. Its guest runs `count` (adds one to a number in memory), `write` (adds one to a number on
/// disk) and `read` (that number).
pub struct SimulatedExecution {
    id: ExecutionId,
    machine: MachineId,
    host: Arc<SimulatedHost>,
    inner: Mutex<Inner>,
    exited: watch::Sender<Option<ExitReason>>,
    ended: CancellationToken,
}

impl SimulatedExecution {
    pub(super) fn new(
        id: ExecutionId,
        machine: MachineId,
        memory: Memory,
        host: Arc<SimulatedHost>,
    ) -> Arc<Self> {
        let inner = Inner {
            state: VmmState::Running,
            memory,
            persisted: None,
            wrote_disk: false,
            n_first_bytes: 0,
            n_pre_copies: 0,
            usage: RunUsage::default(),
        };
        Arc::new(Self {
            id,
            machine,
            host,
            inner: Mutex::new(inner),
            exited: watch::Sender::new(None),
            ended: CancellationToken::new(),
        })
    }

    /// Whose it is.
    #[must_use]
    pub fn machine(&self) -> &MachineId {
        &self.machine
    }

    /// Where its VMM stands.
    #[must_use]
    pub fn state(&self) -> VmmState {
        self.lock().state
    }

    /// Number of times that a first response byte was told of.
    #[must_use]
    pub fn n_first_bytes(&self) -> u64 {
        self.lock().n_first_bytes
    }

    /// Number of times that memory was copied ahead of a pause.
    #[must_use]
    pub fn n_pre_copies(&self) -> u64 {
        self.lock().n_pre_copies
    }

    /// What the run is said to have used.
    pub fn set_usage(&self, usage: RunUsage) {
        self.lock().usage = usage;
    }

    /// The guest or the VMM ends.
    pub fn end(&self, reason: ExitReason) {
        self.lock().state = VmmState::Exited;
        self.host.lock().live.remove(&self.id);
        self.exited.send_replace(Some(reason));
    }

    /// The VMM is gone and nobody is left to hear of it.
    pub(super) fn vanish(&self) {
        self.lock().state = VmmState::Exited;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn die(&self) -> HypervisorError {
        self.end(ExitReason::Failed {
            message: "killed by a fault".to_owned(),
        });
        HypervisorError::new(ErrorCode::Internal, "the VMM is gone")
    }

    fn alive(&self) -> Result<MutexGuard<'_, Inner>, HypervisorError> {
        let inner = self.lock();
        if inner.state == VmmState::Exited {
            return Err(HypervisorError::new(ErrorCode::Internal, "the VMM is gone"));
        }
        Ok(inner)
    }

    /// A guest that was frozen runs on by itself after a failed persist.
    fn thaw(&self) {
        let mut inner = self.lock();
        if inner.state != VmmState::Exited {
            inner.state = VmmState::Running;
        }
    }

    fn save(&self, generation: u64) -> PersistStats {
        let mut inner = self.lock();
        let stats = PersistStats {
            generation,
            disk_generation: inner.memory.disk_generation,
            present_pages: 100,
            written_pages: 10,
            zero_pages: 1,
            written_bytes: 40_960,
            pre_copied_bytes: 0,
            durable_us: 1000,
        };
        let image = SavedImage {
            generation,
            memory: inner.memory,
            corrupt: false,
            fork: false,
        };
        self.host
            .lock()
            .files
            .entry(self.machine.clone())
            .or_default()
            .image = Some(image);
        inner.state = VmmState::Durable;
        inner.wrote_disk = false;
        inner.persisted = Some(stats);
        stats
    }

    fn dial(&self) -> SimulatedGuest {
        let (id, host) = (self.id.clone(), Arc::downgrade(&self.host));
        SimulatedGuest::new(move |argv| {
            let live = host.upgrade().and_then(|host| host.lock().live.get(&id).cloned());
            live.map_or(guest::Ran::Never, |live| live.execute(argv))
        })
    }

    fn execute(&self, argv: &[String]) -> guest::Ran {
        let mut inner = self.lock();
        match inner.state {
            VmmState::Running => {}
            VmmState::Exited => return guest::Ran::Never,
            VmmState::Blank
            | VmmState::Frozen
            | VmmState::Persisting
            | VmmState::Durable
            | VmmState::Dozing => {
                return guest::Ran::NotYet;
            }
        }
        match argv.first().map(String::as_str) {
            Some("count") => {
                inner.memory.counter += 1;
                guest::Ran::Printed(inner.memory.counter.to_string())
            }
            Some("write") => {
                drop(inner);
                guest::Ran::Printed(self.write_disk().to_string())
            }
            Some("read") => {
                drop(inner);
                let host = self.host.lock();
                let files = host.files.get(&self.machine);
                guest::Ran::Printed(files.map_or(0, |files| files.disk_counter).to_string())
            }
            _ => guest::Ran::Refused("no such program".to_owned()),
        }
    }

    fn write_disk(&self) -> u64 {
        let mut inner = self.lock();
        let mut host = self.host.lock();
        let files = host.files.entry(self.machine.clone()).or_default();
        if !inner.wrote_disk {
            files.disk_generation += 1;
            inner.memory.disk_generation = files.disk_generation;
            inner.wrote_disk = true;
        }
        files.disk_counter += 1;
        files.disk_counter
    }
}

#[async_trait]
impl Execution for SimulatedExecution {
    fn id(&self) -> &ExecutionId {
        &self.id
    }

    async fn freeze(&self) -> Result<FreezeTrace, HypervisorError> {
        if self.host.faults.reach_alive(Point::Freeze).await? {
            return Err(self.die());
        }
        self.alive()?.state = VmmState::Frozen;
        Ok(FreezeTrace {
            quiesce_us: 10,
            freeze_us: 20,
        })
    }

    async fn pre_copy(&self) -> Result<(), HypervisorError> {
        self.alive()?.n_pre_copies += 1;
        Ok(())
    }

    async fn persist(&self, generation: u64) -> Result<PersistStats, HypervisorError> {
        self.alive()?.state = VmmState::Persisting;
        match self.host.faults.reach_alive(Point::Persist).await {
            Ok(false) => {}
            Ok(true) => return Err(self.die()),
            Err(error) => {
                self.thaw();
                return Err(error);
            }
        }
        drop(self.alive()?);
        let stats = self.save(generation);
        if self.host.faults.reach_alive(Point::Persisted).await? {
            return Err(self.die());
        }
        Ok(stats)
    }

    async fn run(&self) -> Result<Ran, HypervisorError> {
        if self.host.faults.reach_alive(Point::Run).await? {
            return Err(self.die());
        }
        let mut inner = self.alive()?;
        let persist_cancelled = inner.state == VmmState::Persisting;
        inner.state = VmmState::Running;
        Ok(Ran {
            persist_cancelled,
            run_us: 30,
        })
    }

    async fn quit(&self) {
        // Only waiting makes sense here: ending a VMM does not fail.
        let _ = self.host.faults.reach(Point::Quit).await;
        self.lock().state = VmmState::Exited;
        self.ended.cancel();
        self.host.lock().live.remove(&self.id);
        self.exited.send_if_modified(|exited| {
            let first = exited.is_none();
            exited.get_or_insert(ExitReason::Failed {
                message: "ended".to_owned(),
            });
            first
        });
    }

    async fn quit_parked(&self, lost: CancellationToken) -> bool {
        self.quit().await;
        self.host.lock().parked.insert(self.machine.clone(), lost);
        true
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exited.subscribe()
    }

    async fn connect(&self, port: u16) -> Result<TcpStream, ConnectError> {
        let address = self
            .host
            .lock()
            .ports
            .get(&port)
            .copied()
            .ok_or(ConnectError::Refused { port })?;
        TcpStream::connect(address)
            .await
            .map_err(|error| ConnectError::Unreachable {
                port,
                message: error.to_string(),
            })
    }

    fn guest(&self) -> GuestClient {
        match self.host.lock().agent.clone() {
            Some(agent) => GuestClient::over(Arc::new(RealAgent {
                agent,
                ended: self.ended.clone(),
            })),
            None => GuestClient::over(Arc::new(self.dial())),
        }
    }

    async fn first_byte(&self) {
        self.lock().n_first_bytes += 1;
    }

    async fn usage(&self) -> RunUsage {
        self.lock().usage
    }

    async fn status(&self) -> Result<VmmStatus, HypervisorError> {
        let inner = self.alive()?;
        Ok(VmmStatus {
            state: inner.state,
            persisted: inner.persisted,
            counters: Counters::default(),
        })
    }
}
