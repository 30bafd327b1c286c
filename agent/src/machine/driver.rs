//! The driver of one machine: the task that turns the transition table into calls.
//!
//! One task per machine that is not simply asleep; it is started by the first command and ends when nothing is
//! left to do. Commands come through a bounded channel, each with a place for its answer. The task waits for
//! three things at once: commands, the one operation that is under way, and the end of the VMM. Each becomes an
//! event of [`super::state::next`], whose effects are carried out in order.
//!
//! Invariants: one operation at a time, and beginning one drops the one before; all callers of a wake share its
//! one restore; callers who only need the guest are let in before anything is committed, callers who are shown an
//! execution ID after it is.
//!
//! Not its job: which state follows which (`state`), what is stored (`store`), who may wake (`fleet`).

mod commit;
mod effects;
mod first;
mod held;
mod operation;
mod snapshots;
mod waiters;

pub use first::First;
pub use operation::WakeReport;
pub use snapshots::Staged;
pub use waiters::{Command, Need, PauseOrder, WakeOrder, Woken};

use super::admission::{Patience, Reservation};
use super::error::MachineError;
use super::fleet::Shared;
use super::gate::{Epoch, Gate};
use super::hypervisor::{Execution, FreezeTrace, ImageState};
use super::state::{self, Committed, Effect, Event, Image, State, Step};
use crate::store::{MachineRow, Transition};
use operation::{Operation, Outcome};
use snapshots::Snapshots;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use torpor_api::MachineId;
use torpor_api::http::LastError;
use torpor_api::vmm::{ExitReason, PersistStats, VmmState};
use waiters::Waiters;

/// A commit that failed is tried again after this long, as long as the machine is awake.
const COMMIT_RETRY: Duration = Duration::from_secs(1);

/// A VMM that was found may take this long to say what it persisted last.
const ADOPTION_PATIENCE: Duration = Duration::from_secs(5);

/// What everybody may know of a machine that has a driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// Where it stands; `None` until the driver has read its row.
    pub state: Option<State>,
    /// Its last failure, also when the store could not take it.
    pub last_error: Option<LastError>,
    /// The state is newer than the row, which follows in a moment.
    pub committing: bool,
}

/// A machine that a starting torpord found, with what to do about it.
pub struct Found {
    /// Its row.
    pub row: MachineRow,
    /// Its VMM, if one answers, and where that stands.
    pub vmm: Option<(Arc<dyn Execution>, VmmState)>,
    /// Its image.
    pub image: ImageState,
}

/// Why a driver is started.
pub enum Entry {
    /// Somebody has a command for a machine that has no driver.
    Load,
    /// torpord starts.
    Found(Box<Found>),
}

/// The task's own state.
pub(super) struct Driver {
    id: MachineId,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    live: watch::Sender<Live>,
    gate: Arc<Gate>,
    row: MachineRow,
    state: State,
    operation: Option<Operation>,
    /// A commit that a wake overtook: it lands before anything that is committed later.
    overtaken: Option<Operation>,
    /// A transition that the store did not take.
    uncommitted: Option<Transition>,
    epoch: Option<Arc<Epoch>>,
    exit: Option<watch::Receiver<Option<ExitReason>>>,
    memory: Option<Reservation>,
    /// Of the boot or restore that is under way.
    patience: Option<Patience>,
    /// No image of this generation or below is written again.
    image_floor: u64,
    /// Generation of the image that was last found complete on disk.
    image_found: u64,
    persisted: Option<PersistStats>,
    pause: PauseOrder,
    wake: WakeOrder,
    /// What the machine begins with, while it is being created.
    first: First,
    report: Option<Arc<WakeReport>>,
    freeze: FreezeTrace,
    failure: Option<MachineError>,
    waiters: Waiters,
    snapshots: Snapshots,
}

/// What the task was waiting for.
enum Next {
    Command(Option<Command>),
    Outcome(Outcome),
    Exit(ExitReason),
    RetryCommit,
}

/// Run the driver of `id` until there is nothing left to do.
pub(super) async fn run(
    id: MachineId,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    live: watch::Sender<Live>,
    gate: Arc<Gate>,
    entry: Entry,
) {
    let (found, step) = match entry {
        Entry::Found(found) => {
            let step = recovery_step(&found);
            (*found, step)
        }
        Entry::Load => match load(&id, &shared).await {
            Ok(Some(found)) if found.row.committed == Committed::Creating => {
                // Only a create that is under way leads here: what a dead torpord left half made is recovered.
                (found, (State::Creating, [Effect::Boot].as_slice()))
            }
            Ok(Some(found)) => {
                let step = recovery_step(&found);
                (found, step)
            }
            Ok(None) => return refuse(&id, &shared, commands, &MachineError::not_found(&id)).await,
            Err(error) => return refuse(&id, &shared, commands, &error).await,
        },
    };
    let mut driver = Driver::new(id, shared, commands, live, gate, &found);
    driver.take_up(found, step).await;
    driver.serve().await;
    // Whoever gets no answer asks the next driver.
    hang_up(driver.commands, drop).await;
}

async fn load(id: &MachineId, shared: &Shared) -> Result<Option<Found>, MachineError> {
    let Some(row) = shared.store.machine(id).await? else {
        return Ok(None);
    };
    let image = match row.committed {
        Committed::Running => shared.hypervisor.inspect_image(id).await,
        Committed::Creating
        | Committed::Paused
        | Committed::Refused
        | Committed::Stopped
        | Committed::Deleting => ImageState::None,
    };
    Ok(Some(Found {
        row,
        vmm: None,
        image,
    }))
}

fn recovery_step(found: &Found) -> Step {
    let image = match &found.image {
        ImageState::Valid { generation } if *generation >= found.row.image_generation => Image::Fits,
        ImageState::Valid { .. }
        | ImageState::None
        | ImageState::Stale { .. }
        | ImageState::Corrupt { .. } => Image::Unusable,
    };
    state::recover(
        found.row.committed,
        found.vmm.as_ref().map(|(_, state)| *state),
        image,
    )
}

async fn refuse(id: &MachineId, shared: &Shared, commands: mpsc::Receiver<Command>, error: &MachineError) {
    shared.registry.leave(id, || true);
    hang_up(commands, |command| command.refuse(error.clone())).await;
}

/// Take no more commands, and give away those that came while the driver left the registry.
///
/// Dropping the queue is not enough: a sender that had its place in it before may put its command there after, and
/// waits for the answer with the queue in its hands, so that neither is ever dropped. `recv` on a closed queue ends
/// when no such place is left.
async fn hang_up(mut commands: mpsc::Receiver<Command>, give_away: impl Fn(Command)) {
    commands.close();
    while let Some(command) = commands.recv().await {
        give_away(command);
    }
}

impl Driver {
    fn new(
        id: MachineId,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
        live: watch::Sender<Live>,
        gate: Arc<Gate>,
        found: &Found,
    ) -> Self {
        let on_disk = match found.image {
            ImageState::Valid { generation } | ImageState::Stale { generation } => generation,
            ImageState::None | ImageState::Corrupt { .. } => 0,
        };
        Self {
            image_floor: found.row.image_generation.max(on_disk),
            image_found: on_disk,
            row: found.row.clone(),
            state: found.row.committed.at_rest(),
            id,
            shared,
            commands,
            live,
            gate,
            operation: None,
            overtaken: None,
            uncommitted: None,
            epoch: None,
            exit: None,
            memory: None,
            patience: None,
            persisted: None,
            pause: PauseOrder::by("recovery"),
            wake: WakeOrder::by("recovery"),
            first: First::Boot,
            report: None,
            freeze: FreezeTrace::default(),
            failure: None,
            waiters: Waiters::default(),
            snapshots: Snapshots::default(),
        }
    }

    /// Begin where the row, the VMM and the image say.
    async fn take_up(&mut self, found: Found, (state, effects): Step) {
        if let Some((execution, _)) = found.vmm {
            self.adopt(execution).await;
            self.gate.touch_all(self.shared.clock.now_unix_ms());
        }
        self.state = state;
        self.publish(effects);
        if state == State::Running {
            self.let_in();
        }
        // The caller of a create is registered before anything can fail.
        if state == State::Creating
            && let Some(command) = self.commands.recv().await
        {
            self.command(command).await;
            if self.state != State::Creating {
                return;
            }
        }
        for effect in effects {
            self.perform(*effect, None).await;
        }
        self.show_committed();
        self.settle_and_go_on().await;
    }

    async fn serve(&mut self) {
        loop {
            if self.may_leave() && self.leave() {
                return;
            }
            match self.wait().await {
                Next::Command(Some(command)) => self.command(command).await,
                // Every handle is gone, and so is whoever could ask: torpord is ending. VMMs live on.
                Next::Command(None) => return,
                Next::Outcome(outcome) => {
                    self.operation = None;
                    let event = self.conclude(outcome).await;
                    self.apply(event).await;
                }
                Next::Exit(reason) => self.ended(reason).await,
                Next::RetryCommit => self.retry_commit().await,
            }
        }
    }

    async fn wait(&mut self) -> Next {
        let operation = async {
            match self.operation.as_mut() {
                Some(operation) => operation.future.as_mut().await,
                None => std::future::pending().await,
            }
        };
        let exit = async {
            match self.exit.as_mut() {
                Some(exit) => match exit.wait_for(Option::is_some).await {
                    Ok(reason) => reason.clone(),
                    Err(_) => None,
                }
                .unwrap_or_else(|| ExitReason::Failed {
                    message: "the VMM is gone".to_owned(),
                }),
                None => std::future::pending().await,
            }
        };
        let retry = async {
            match self.uncommitted {
                Some(_) => tokio::time::sleep(COMMIT_RETRY).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            outcome = operation => Next::Outcome(outcome),
            reason = exit => Next::Exit(reason),
            command = self.commands.recv() => Next::Command(command),
            () = retry => Next::RetryCommit,
        }
    }

    /// Nothing is under way and nobody waits.
    fn may_leave(&self) -> bool {
        let idle = self.operation.is_none() && self.overtaken.is_none() && self.waiters.is_empty();
        let idle = idle && self.snapshots.is_empty();
        let asleep = self.state.is_at_rest() || self.state == State::Deleting;
        idle && asleep && self.uncommitted.is_none()
    }

    /// Leave the registry, unless a command came meanwhile.
    fn leave(&mut self) -> bool {
        let commands = &self.commands;
        self.shared.registry.leave(&self.id, || commands.is_empty())
    }

    /// Carry an event through the table, and whatever follows from it.
    async fn apply(&mut self, event: Event) {
        if self.apply_once(event).await {
            self.settle_and_go_on().await;
        }
    }

    async fn settle_and_go_on(&mut self) {
        while let Some(event) = self.settle() {
            if !self.apply_once(event).await {
                break;
            }
        }
    }

    async fn apply_once(&mut self, event: Event) -> bool {
        let (state, effects) = match state::next(self.state, event) {
            Ok(step) => step,
            Err(denied) => {
                tracing::error!(machine_id = %self.id, state = ?self.state, ?event, %denied, "event ignored");
                return false;
            }
        };
        tracing::debug!(machine_id = %self.id, from = ?self.state, to = ?state, ?event, "transition");
        self.state = state;
        self.publish(effects);
        if state == State::Running {
            self.let_in();
        }
        for effect in effects {
            self.perform(*effect, Some(event)).await;
        }
        self.show_committed();
        true
    }

    fn publish(&mut self, effects: &[Effect]) {
        // The gate stays open in a freeze until requests in flight are out; the operation shuts it then.
        if !matches!(self.state, State::Running | State::Freezing) {
            self.gate.shut();
        }
        let committing = effects.iter().any(|effect| match effect {
            Effect::CommitRunning | Effect::CommitPaused | Effect::CommitRefused | Effect::CommitStopped => {
                true
            }
            Effect::QuitExecution
            | Effect::Boot
            | Effect::Restore
            | Effect::Freeze
            | Effect::Persist
            | Effect::CommitPause
            | Effect::Run
            | Effect::Capture
            | Effect::Copy
            | Effect::Evict
            | Effect::Delete => false,
        });
        self.live.send_if_modified(|live| {
            let changed = live.state != Some(self.state) || live.committing != committing;
            live.state = Some(self.state);
            live.committing = committing;
            changed
        });
    }

    fn show_committed(&self) {
        self.live
            .send_if_modified(|live| std::mem::take(&mut live.committing));
    }

    /// Open the gate, and let in who only waited for that. No commit comes before this.
    fn let_in(&mut self) {
        let Some(epoch) = &self.epoch else { return };
        self.gate.open(epoch, self.shared.clock.now_unix_ms());
        self.shared.dawn.tell(&self.id);
        self.waiters
            .let_in(&self.gate, self.shared.clock.now_unix_ms(), self.report.as_ref());
    }
}
