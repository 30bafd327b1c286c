//! Commands to a driver, and who waits for which answer.

use super::super::error::MachineError;
use super::super::gate::{Gate, Pass};
use super::super::state::{Event, State, next};
use super::{Driver, First, Staged, WakeReport};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use torpor_api::activity::ActivitySource;
use torpor_api::{ErrorCode, MachineId, SnapshotId};
use torpor_proxy::Activity;

/// What a wake is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The guest; answered as soon as it runs.
    Guest,
    /// The machine as it is shown, with its execution; answered when that is committed.
    Machine,
    /// The same, booted from its disk.
    MachineFromDisk,
}

/// A wish for a running machine, and where it comes from.
#[derive(Debug, Clone)]
pub struct WakeOrder {
    /// What for.
    pub need: Need,
    /// Who: `api`, `http`, `tcp`, `ssh`, `lease`, `guest` or `recovery`.
    pub actor: &'static str,
    /// Details for the events table.
    pub cause: serde_json::Value,
    /// When it was asked for.
    pub asked: Instant,
    /// How long the caller waits; the host's own bound if `None`.
    pub patience: Option<Duration>,
    /// What a machine that is being created begins with.
    pub first: First,
}

impl WakeOrder {
    /// A wish for the guest without details.
    #[must_use]
    pub fn by(actor: &'static str) -> Self {
        Self {
            need: Need::Guest,
            actor,
            cause: serde_json::Value::Null,
            asked: Instant::now(),
            patience: None,
            first: First::Boot,
        }
    }

    /// Port of the guest that the traffic wants, if it is traffic: part of the details.
    pub(super) fn first_port(&self) -> Option<u16> {
        let port = self.cause.get("port").and_then(serde_json::Value::as_u64);
        port.and_then(|port| u16::try_from(port).ok())
    }

    /// As what it counts.
    fn source(&self) -> ActivitySource {
        match self.actor {
            "http" | "tcp" => ActivitySource::Proxy,
            _ => ActivitySource::Sessions,
        }
    }

    fn event(&self) -> Event {
        match self.need {
            Need::Guest => Event::Wake,
            Need::Machine => Event::Resume,
            Need::MachineFromDisk => Event::BootFromDisk,
        }
    }
}

/// A wish for sleep or for deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PauseOrder {
    /// Who.
    pub actor: &'static str,
    /// Do it only if the lease's deadline is still this one.
    pub only_if_deadline_unix_ms: Option<u64>,
    /// Delete it only if it is at rest and its retention has ended by then.
    pub only_if_expired_at_unix_ms: Option<u64>,
}

impl PauseOrder {
    /// Without a condition.
    #[must_use]
    pub fn by(actor: &'static str) -> Self {
        Self {
            actor,
            only_if_deadline_unix_ms: None,
            only_if_expired_at_unix_ms: None,
        }
    }
}

/// A running machine, held open for whoever got this.
pub struct Woken {
    /// The way in; while it is held, a pause waits a little.
    pub pass: Pass,
    /// The wake that this caller waited for, if it did.
    pub report: Option<Arc<WakeReport>>,
    /// Where payload bytes of the machine are counted.
    pub activity: Arc<Activity>,
}

/// The place for an answer.
pub type Reply<T> = oneshot::Sender<Result<T, MachineError>>;

/// What is asked of a driver.
pub enum Command {
    /// Get it running.
    Wake(WakeOrder, Reply<Woken>),
    /// It will be put to sleep soon: write its memory ahead, if it runs and nothing else is under way.
    PreCopy,
    /// Put it to sleep; answered when it is evicted.
    Pause(PauseOrder, Reply<()>),
    /// Take a snapshot of it under this ID; answered when its files are in place.
    Snapshot(SnapshotId, Reply<Staged>),
    /// Delete it; answered when nothing of it is left.
    Delete(PauseOrder, Reply<()>),
}

impl Command {
    /// Answer with an error. The caller may be gone.
    pub fn refuse(self, error: MachineError) {
        match self {
            Self::PreCopy => {}
            Self::Wake(_, reply) => drop(reply.send(Err(error))),
            Self::Snapshot(_, reply) => drop(reply.send(Err(error))),
            Self::Pause(_, reply) | Self::Delete(_, reply) => drop(reply.send(Err(error))),
        }
    }
}

/// Who waits.
#[derive(Default)]
pub(super) struct Waiters {
    wakes: Vec<(Need, ActivitySource, Reply<Woken>)>,
    pauses: Vec<Reply<()>>,
    deletes: Vec<Reply<()>>,
}

impl Waiters {
    pub(super) fn is_empty(&self) -> bool {
        self.wakes.is_empty() && self.pauses.is_empty() && self.deletes.is_empty()
    }

    /// Whether somebody waits for the machine as it is shown.
    pub(super) fn need_commit(&self) -> bool {
        self.wakes.iter().any(|(need, ..)| *need != Need::Guest)
    }

    /// Let in those who need no more than the guest.
    pub(super) fn let_in(&mut self, gate: &Gate, now_unix_ms: u64, report: Option<&Arc<WakeReport>>) {
        let waiting = std::mem::take(&mut self.wakes);
        for (need, source, reply) in waiting {
            if need == Need::Guest {
                answer_wake((source, reply), gate, now_unix_ms, report);
            } else {
                self.wakes.push((need, source, reply));
            }
        }
    }

    fn end_wakes(&mut self, error: &MachineError) {
        for (_, _, reply) in self.wakes.drain(..) {
            let _ = reply.send(Err(error.clone()));
        }
    }

    fn end_pauses(&mut self, outcome: &Result<(), MachineError>) {
        for reply in self.pauses.drain(..) {
            let _ = reply.send(outcome.clone());
        }
    }

    fn end_deletes(&mut self, outcome: &Result<(), MachineError>) {
        for reply in self.deletes.drain(..) {
            let _ = reply.send(outcome.clone());
        }
    }
}

fn answer_wake(
    (source, reply): (ActivitySource, Reply<Woken>),
    gate: &Gate,
    now_unix_ms: u64,
    report: Option<&Arc<WakeReport>>,
) {
    // Whoever gave up takes no pass.
    if reply.is_closed() {
        return;
    }
    let Some(pass) = gate.enter(source, now_unix_ms) else {
        let error = MachineError::new(ErrorCode::ResumeFailed, "the machine stopped as soon as it ran");
        let _ = reply.send(Err(error));
        return;
    };
    let _ = reply.send(Ok(Woken {
        pass,
        report: report.cloned(),
        activity: Arc::clone(gate.activity()),
    }));
}

impl Driver {
    pub(super) async fn command(&mut self, command: Command) {
        match command {
            Command::Wake(order, reply) => self.on_wake(order, reply).await,
            Command::PreCopy => self.on_pre_copy().await,
            Command::Pause(order, reply) => self.on_pause(order, reply).await,
            Command::Snapshot(id, reply) => self.on_snapshot(id, reply).await,
            Command::Delete(order, reply) => self.on_delete(order, reply).await,
        }
    }

    async fn on_wake(&mut self, order: WakeOrder, reply: Reply<Woken>) {
        let event = order.event();
        match next(self.state, event) {
            Err(denied) => {
                let _ = reply.send(Err(self.refusal("wake", denied)));
            }
            Ok((state, _)) => {
                self.waiters.wakes.push((order.need, order.source(), reply));
                if let Some(patience) = &self.patience {
                    patience.prolong(order.patience.unwrap_or(self.shared.settings.wake_timeout));
                }
                if self.state == State::Creating && self.operation.is_none() {
                    self.first.clone_from(&order.first);
                    self.wake = order.clone();
                }
                let is_next =
                    matches!(state, State::Evicting | State::Copying) && self.waiters.wakes.len() == 1;
                if state != self.state {
                    self.report = None;
                    self.failure = None;
                    self.wake = order;
                } else if is_next {
                    // It begins as soon as that is over, and is told of as this caller's.
                    self.report = None;
                    self.wake = order;
                } else if state == State::Running {
                    // Already awake: no wake to tell of.
                    self.report = None;
                }
                self.apply(event).await;
            }
        }
    }

    /// By the driver, because no snapshot may take the image over meanwhile.
    async fn on_pre_copy(&mut self) {
        let Some(epoch) = self.epoch.clone().filter(|_| self.state == State::Running) else {
            return;
        };
        if let Err(error) = epoch.execution.pre_copy().await {
            tracing::debug!(machine_id = %self.id, %error, "memory not copied ahead of the pause");
        }
    }

    async fn on_pause(&mut self, order: PauseOrder, reply: Reply<()>) {
        match next(self.state, Event::Pause) {
            Err(denied) => {
                let _ = reply.send(Err(self.refusal("pause", denied)));
            }
            Ok((state, _)) => {
                self.waiters.pauses.push(reply);
                if state != self.state {
                    self.failure = None;
                    self.pause = order;
                } else if order.only_if_deadline_unix_ms.is_none() {
                    // An operator's wish has no condition, and makes the lease's unconditional.
                    self.pause = order;
                }
                self.apply(Event::Pause).await;
            }
        }
    }

    async fn on_delete(&mut self, order: PauseOrder, reply: Reply<()>) {
        if self.state == State::Gone {
            // What another call, or an earlier torpord, had begun ended just before this one was heard.
            let _ = reply.send(Ok(()));
            return;
        }
        if let Err(denied) = next(self.state, Event::Delete) {
            let _ = reply.send(Err(self.refusal("delete", denied)));
            return;
        }
        let lease_is_early = order.only_if_deadline_unix_ms.is_some() && self.state != State::Running;
        let retention_is_late = order.only_if_expired_at_unix_ms.is_some() && !self.state.is_at_rest();
        if lease_is_early || retention_is_late {
            // The timer asks again; whatever is under way comes first.
            let _ = reply.send(Err(self.refusal("delete", super::state::Denied::Busy)));
            return;
        }
        if self.state != State::Deleting
            && let Err(error) = self.commit_deleting(order).await
        {
            let _ = reply.send(Err(error));
            return;
        }
        self.waiters.deletes.push(reply);
        self.apply(Event::Delete).await;
    }

    /// A refused image is told as it was when it was refused.
    pub(super) fn refusal(&self, operation: &str, denied: super::state::Denied) -> MachineError {
        match (denied, &self.row.last_error) {
            (super::state::Denied::ImageRefused, Some(last)) => {
                MachineError::new(last.code, last.message.clone())
            }
            (denied, _) => MachineError::denied(&self.id, operation, denied),
        }
    }

    /// Answer whoever can be answered where the machine stands now; an event if somebody wants more of it.
    pub(super) fn settle(&mut self) -> Option<Event> {
        self.refuse_snapshots();
        match self.state {
            State::Running => {
                let error = self.failure.take().unwrap_or_else(|| overtaken(&self.id));
                self.waiters.end_pauses(&Err(error));
                self.answer_committed();
                self.next_snapshot()
            }
            State::Paused | State::Refused => {
                let failure = self.failure.take();
                self.waiters.end_pauses(&failure.clone().map_or(Ok(()), Err));
                match failure {
                    Some(error) => self.waiters.end_wakes(&error),
                    // Somebody asked while the VMM was being ended.
                    None if !self.waiters.wakes.is_empty() => return Some(Event::Wake),
                    None => {}
                }
                self.next_snapshot()
            }
            State::Stopped => {
                let stopped = || MachineError::new(ErrorCode::MachineNotReady, "the guest has powered off");
                let error = self.failure.take().unwrap_or_else(stopped);
                self.waiters.end_pauses(&Err(error.clone()));
                self.waiters.end_wakes(&error);
                None
            }
            State::Deleting | State::Gone => {
                self.settle_deletion();
                None
            }
            State::Starting => {
                let error = MachineError::new(ErrorCode::MachineNotReady, "the guest is rebooting");
                self.waiters.end_pauses(&Err(error));
                None
            }
            State::Creating
            | State::Capturing
            | State::Freezing
            | State::Persisting
            | State::Durable
            | State::Evicting
            | State::Copying
            | State::Waking => None,
        }
    }

    fn settle_deletion(&mut self) {
        let error = self
            .failure
            .clone()
            .unwrap_or_else(|| MachineError::not_found(&self.id));
        self.waiters.end_wakes(&error);
        self.waiters.end_pauses(&Err(error));
        self.shared.dawn.tell(&self.id);
        if self.state == State::Gone {
            self.waiters.end_deletes(&Ok(()));
        } else if self.operation.is_none() {
            let failed = || MachineError::new(ErrorCode::Internal, "the deletion failed");
            let error = self.failure.take().unwrap_or_else(failed);
            self.waiters.end_deletes(&Err(error));
        }
    }

    fn answer_committed(&mut self) {
        let now_unix_ms = self.shared.clock.now_unix_ms();
        let uncommitted = self.uncommitted.is_some();
        for (_, source, reply) in std::mem::take(&mut self.waiters.wakes) {
            if uncommitted {
                let message = "the machine runs, but its execution could not be committed";
                let _ = reply.send(Err(MachineError::new(ErrorCode::Internal, message)));
            } else {
                answer_wake((source, reply), &self.gate, now_unix_ms, self.report.as_ref());
            }
        }
    }
}

fn overtaken(id: &MachineId) -> MachineError {
    let message = format!("the pause of machine {id} was overtaken by a wake");
    MachineError::new(ErrorCode::TransitionInProgress, message)
}
