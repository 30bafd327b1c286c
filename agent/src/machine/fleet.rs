//! All machines of this host: the operations that the API, the proxy and the lease timer share.
//!
//! Finds or starts the driver of a machine, checks wake policies, bounds waits. Reads go to the store and to what
//! drivers show; they start no driver and wake nothing.

mod create;
mod entry;
mod filter;
mod fork;
mod grants;
mod policy;
mod presence;
mod reboot;
mod settings;
mod snapshots;
mod turns;
mod view;
mod warm;

pub use create::CreateOrder;
pub use fork::{ForkOrder, TemplateSnapshotOrder};
pub use policy::{PolicyRule, check_lease_and_wake};
pub use presence::Presence;
pub use reboot::Reshape;
pub use settings::Settings;
pub use snapshots::SnapshotOrder;
pub use view::{MachineQuery, status_counts};

use super::admission::Admission;
use super::clock::Clock;
use super::dawn::Dawn;
use super::driver::{self, Command, Entry, Live, Need, PauseOrder, WakeOrder, Woken};
use super::error::MachineError;
use super::gate::Gate;
use super::hypervisor::Hypervisor;
use super::lines::LineBook;
use super::registry::{Handle, Registry};
use super::routes::Routes;
use super::telemetry::Telemetry;
use super::usage::Meter;
use crate::edge::Edge;
use crate::edge::filter::Filters;
use crate::ssh::Door;
use crate::store::{MachineRow, NewEvent, Store};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use torpor_api::activity::ActivitySource;
use torpor_api::http::{ExecRequest, ExecResult, MachineStatus, ResumeFrom, WakePolicy};
use torpor_api::{ErrorCode, ExecutionId, MachineId};

const COMMAND_QUEUE_LEN: usize = 64;

/// A wake that ends in the same moment as its caller's patience may still say how.
const LAST_WORD: Duration = Duration::from_millis(100);

/// Who wants a machine awake; each has its switch in the wake policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WakeSource {
    /// HTTP and WebSocket requests.
    Http,
    /// SSH logins.
    Ssh,
    /// Raw TCP connections.
    Tcp,
    /// API calls that need the guest.
    Api,
}

impl WakeSource {
    /// As it stands in events.
    #[must_use]
    pub fn actor(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Ssh => "ssh",
            Self::Tcp => "tcp",
            Self::Api => "api",
        }
    }

    /// As what it counts.
    #[must_use]
    pub fn activity(self) -> ActivitySource {
        match self {
            Self::Http | Self::Tcp => ActivitySource::Proxy,
            Self::Ssh | Self::Api => ActivitySource::Sessions,
        }
    }

    /// Its switch.
    #[must_use]
    pub fn allowed_by(self, policy: WakePolicy) -> bool {
        match self {
            Self::Http => policy.http,
            Self::Ssh => policy.ssh,
            Self::Tcp => policy.tcp,
            Self::Api => policy.api,
        }
    }
}

/// What every driver needs.
pub struct Shared {
    pub(super) store: Store,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) registry: Registry,
    pub(super) routes: Arc<Routes>,
    pub(super) ssh: OnceLock<Arc<Door>>,
    pub(super) memory: Arc<Admission>,
    pub(super) restoring: Semaphore,
    pub(super) edge: Edge,
    pub(super) lines: Arc<LineBook>,
    pub(super) filters: Filters,
    pub(super) wake_times: filter::WakeTimes,
    pub(super) meter: Meter,
    pub(super) telemetry: Telemetry,
    pub(super) leases_changed: Notify,
    pub(super) retention_changed: Notify,
    turns: turns::Turns,
    pub(super) dawn: Dawn,
    pub(super) tasks: TaskTracker,
    pub(super) halted: CancellationToken,
    pub(super) settings: Settings,
}

/// All machines of this host; clones share them.
#[derive(Clone)]
pub struct Fleet {
    pub(super) shared: Arc<Shared>,
}

impl Fleet {
    /// The machines of this store, run by this hypervisor. [`Fleet::recover`] comes before anything else.
    #[must_use]
    pub fn new(
        store: Store,
        hypervisor: Arc<dyn Hypervisor>,
        clock: Arc<dyn Clock>,
        settings: Settings,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                hypervisor,
                clock,
                registry: Registry::default(),
                routes: Arc::default(),
                ssh: OnceLock::new(),
                memory: Admission::new(settings.max_running_mem_mib),
                restoring: Semaphore::new(settings.max_restoring),
                edge: Edge::default(),
                lines: Arc::default(),
                filters: Filters::default(),
                wake_times: filter::WakeTimes::default(),
                meter: Meter::default(),
                telemetry: Telemetry::default(),
                leases_changed: Notify::new(),
                retention_changed: Notify::new(),
                turns: turns::Turns::default(),
                dawn: Dawn::default(),
                tasks: TaskTracker::new(),
                halted: CancellationToken::new(),
                settings,
            }),
        }
    }

    /// The store, for reads that are not about one machine's state.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// The platform, for templates and consoles.
    #[must_use]
    pub fn hypervisor(&self) -> &Arc<dyn Hypervisor> {
        &self.shared.hypervisor
    }

    /// Where the proxy's ports lead.
    #[must_use]
    pub fn routes(&self) -> &Arc<Routes> {
        &self.shared.routes
    }

    /// Who is let in to services that ask for a token.
    #[must_use]
    pub fn edge(&self) -> &Edge {
        &self.shared.edge
    }

    /// Bounds and addresses.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Number of machines that have a task.
    #[must_use]
    pub fn n_drivers(&self) -> usize {
        self.shared.registry.len()
    }

    /// The time, as leases see it.
    #[must_use]
    pub fn now_unix_ms(&self) -> u64 {
        self.shared.clock.now_unix_ms()
    }

    /// The machine that has this ID, had this execution or has this name.
    ///
    /// # Errors
    /// `machine_not_found`, or the store refuses.
    pub async fn resolve(&self, text: &str) -> Result<MachineId, MachineError> {
        self.shared
            .store
            .resolve(text)
            .await?
            .ok_or_else(|| MachineError::not_found(cut(text)))
    }

    /// Get the guest running for traffic, if its policy lets this traffic do so, within the bounded wait.
    ///
    /// # Errors
    /// The policy, the wake itself, or `machine_resume_timeout`; the wake goes on after that.
    pub async fn wake(
        &self,
        id: &MachineId,
        source: WakeSource,
        cause: serde_json::Value,
    ) -> Result<Woken, MachineError> {
        self.wake_within(self.shared.settings.wake_timeout, id, source, cause)
            .await
    }

    /// Likewise, with a bound of the caller's own.
    ///
    /// # Errors
    /// See [`Fleet::wake`].
    pub async fn wake_within(
        &self,
        bound: Duration,
        id: &MachineId,
        source: WakeSource,
        cause: serde_json::Value,
    ) -> Result<Woken, MachineError> {
        if let Some(handle) = self.shared.registry.find(id)
            && let Some(pass) = handle.gate.enter(source.activity(), self.now_unix_ms())
        {
            let activity = Arc::clone(handle.gate.activity());
            return Ok(Woken {
                pass,
                report: None,
                activity,
            });
        }
        self.check_entry(id, source).await?;
        let order = WakeOrder {
            cause,
            patience: Some(bound),
            ..WakeOrder::by(source.actor())
        };
        self.bounded(
            bound,
            id,
            self.send(id, |reply| Command::Wake(order.clone(), reply)),
        )
        .await
    }

    /// Get the machine running because its owner says so; answered when its execution is committed.
    ///
    /// # Errors
    /// The restore or boot failed, or the machine is in no state for it.
    pub async fn resume(&self, id: &MachineId, from: ResumeFrom) -> Result<(), MachineError> {
        let need = match from {
            ResumeFrom::Memory => Need::Machine,
            ResumeFrom::Disk => Need::MachineFromDisk,
        };
        let order = WakeOrder {
            need,
            ..WakeOrder::by("api")
        };
        self.send(id, |reply| Command::Wake(order.clone(), reply))
            .await
            .map(drop)
    }

    /// Put the machine to sleep; answered when its image is durable and its VMM is gone.
    ///
    /// # Errors
    /// The pause failed or was overtaken, and the machine runs on.
    pub async fn pause(&self, id: &MachineId, order: PauseOrder) -> Result<(), MachineError> {
        self.send(id, |reply| Command::Pause(order, reply)).await
    }

    /// Delete the machine in whatever state it is; answered when nothing of it is left.
    ///
    /// # Errors
    /// Its files or row could not be removed; the deletion is taken up again by the next call or start.
    pub async fn delete(&self, id: &MachineId, order: PauseOrder) -> Result<(), MachineError> {
        self.send(id, |reply| Command::Delete(order, reply)).await
    }

    /// The request with the machine's own environment and directory where it names none.
    ///
    /// # Errors
    /// The machine is gone, or the store refuses.
    pub async fn with_defaults(
        &self,
        id: &MachineId,
        mut request: ExecRequest,
    ) -> Result<ExecRequest, MachineError> {
        let row = self.shared.store.machine(id).await?;
        let row = row.ok_or_else(|| MachineError::not_found(id))?;
        let mut env = row.env;
        env.append(&mut request.env);
        request.env = env;
        request.cwd = request.cwd.or(row.cwd);
        Ok(request)
    }

    /// Run a command in the guest, waking it if its policy lets API calls do so.
    ///
    /// # Errors
    /// The wake's and the guest's.
    pub async fn exec(&self, id: &MachineId, request: ExecRequest) -> Result<ExecResult, MachineError> {
        let request = self.with_defaults(id, request).await?;
        self.inside(id.clone(), WakeSource::Api).exec(request).await
    }

    /// Write down how long the request that woke the machine waited for its answer.
    pub async fn record_first_byte(
        &self,
        id: &MachineId,
        execution: &ExecutionId,
        detail: serde_json::Value,
    ) {
        let mut event = self.event(id, "machine.first_byte", "http", detail);
        event.execution = Some(execution.clone());
        // The wake is told of first.
        self.caught_up(Some(id)).await;
        if let Err(error) = self.shared.store.append_event(event).await {
            tracing::warn!(machine_id = %id, %error, "first byte not recorded");
        }
    }

    /// Stop every driver where it stands. VMMs live on; the next torpord takes them over.
    pub async fn halt(&self) {
        self.shared.halted.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    /// The machine's row and what its driver shows, in an order in which neither is older than the call.
    pub(super) async fn look(&self, id: &MachineId) -> Result<(MachineRow, Option<Live>), MachineError> {
        let handle = self.shared.registry.find(id);
        let row = self
            .shared
            .store
            .machine(id)
            .await?
            .ok_or_else(|| MachineError::not_found(id))?;
        Ok((row, handle.map(|handle| handle.live.borrow().clone())))
    }

    /// Send a command to the machine's driver and wait for the answer. A driver that left in the same moment
    /// answers nothing, and its successor is asked.
    async fn send<T>(
        &self,
        id: &MachineId,
        command: impl Fn(oneshot::Sender<Result<T, MachineError>>) -> Command,
    ) -> Result<T, MachineError> {
        loop {
            if self.shared.halted.is_cancelled() {
                return Err(MachineError::new(ErrorCode::ResumeFailed, "torpord is ending"));
            }
            let handle = self.driver(id, Entry::Load);
            let (reply, answer) = oneshot::channel();
            if handle.commands.send(command(reply)).await.is_err() {
                continue;
            }
            if let Ok(outcome) = answer.await {
                return outcome;
            }
        }
    }

    async fn bounded<T>(
        &self,
        bound: Duration,
        id: &MachineId,
        answer: impl Future<Output = Result<T, MachineError>>,
    ) -> Result<T, MachineError> {
        let mut answer = pin!(answer);
        if let Ok(answer) = tokio::time::timeout(bound, &mut answer).await {
            return answer;
        }
        // The wake's own patience ends in about the same moment; which of the two is told must not be luck.
        if self.shared.memory.is_waiting(id) {
            let message = format!(
                "machine {id} got no memory of the host within {} s",
                bound.as_secs_f64()
            );
            return Err(MachineError::new(ErrorCode::CapacityExceeded, message));
        }
        tokio::time::timeout(LAST_WORD, answer).await.unwrap_or_else(|_| {
            let message = format!("machine {id} was not awake within {} s", bound.as_secs_f64());
            Err(MachineError::new(ErrorCode::ResumeTimeout, message))
        })
    }

    /// The machine's driver, started with `entry` if it has none.
    pub(super) fn driver(&self, id: &MachineId, entry: Entry) -> Handle {
        self.shared.registry.find_or(id, || {
            let (commands, queue) = mpsc::channel(COMMAND_QUEUE_LEN);
            let (show, live) = watch::channel(Live {
                state: None,
                last_error: None,
                committing: false,
            });
            let gate = Arc::new(Gate::default());
            let task = driver::run(
                id.clone(),
                Arc::clone(&self.shared),
                queue,
                show,
                Arc::clone(&gate),
                entry,
            );
            let halted = self.shared.halted.clone();
            self.shared
                .tasks
                .spawn(async move { halted.run_until_cancelled(task).await });
            Handle { commands, live, gate }
        })
    }

    pub(super) fn event(
        &self,
        machine: &MachineId,
        kind: &'static str,
        actor: &'static str,
        detail: serde_json::Value,
    ) -> NewEvent {
        NewEvent {
            at_unix_ms: self.now_unix_ms(),
            machine: machine.clone(),
            execution: None,
            kind,
            actor,
            detail,
        }
    }
}

/// Hostile text, short enough for a message.
fn cut(text: &str) -> String {
    format!("{:?}", text.chars().take(64).collect::<String>())
}

/// What users see of a row and of what its driver shows.
pub(super) fn status_of(row: &MachineRow, live: Option<&Live>) -> MachineStatus {
    live.and_then(|live| live.state)
        .unwrap_or_else(|| row.committed.at_rest())
        .status()
}
