//! The lifecycle of a machine: every state, every event, and the only transition table.
//!
//! Pure: no I/O, no clock, no locks. [`next`] answers what a machine becomes and what its driver then does;
//! [`recover`] answers the same for what a starting torpord finds. `docs/lifecycle.md` is rendered from here.
//!
//! Invariants that the table keeps, each with a property test:
//! a delete is never denied; a wake is denied only by a refused image or a deletion; one [`Effect`] at most of
//! each list takes time, so there are never two restores at once.
//!
//! Not its job: who waits for what, which is [`crate::machine::driver`]'s.

mod recovery;

pub use recovery::{Committed, Image, recover};

use torpor_api::http::MachineStatus;

/// Where a machine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Its first boot, for a create that has not been answered.
    Creating,
    /// A boot from its disk.
    Starting,
    /// vCPUs run, the guest answers.
    Running,
    /// Awake, and held still for a moment while a snapshot is taken of it.
    Capturing,
    /// Requests in flight are being let out, then the vCPUs stopped.
    Freezing,
    /// Frozen, the image being written.
    Persisting,
    /// Frozen, the image on disk, the row being committed.
    Durable,
    /// Committed as asleep; its VMM is on its way out.
    Evicting,
    /// Asleep with its memory: an image and a row.
    Paused,
    /// Asleep, and a snapshot is being taken of its files.
    Copying,
    /// Asleep, and its image was refused as damaged or foreign: only an explicit resume tries again.
    Refused,
    /// On its way to running: a restore, or a frozen guest set free.
    Waking,
    /// A disk and a row, no memory.
    Stopped,
    /// Being deleted.
    Deleting,
    /// Deleted: no row, no files.
    Gone,
}

/// What can happen to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Somebody needs the guest.
    Wake,
    /// The operator wants it running.
    Resume,
    /// The operator wants it booted from its disk.
    BootFromDisk,
    /// It shall sleep.
    Pause,
    /// A snapshot of it is wanted.
    Snapshot,
    /// It shall go.
    Delete,
    /// A boot ended with an answering guest.
    Booted,
    /// A boot did not.
    BootFailed,
    /// A restore ended with a running guest.
    Restored,
    /// A restore did not; another try may.
    RestoreFailed,
    /// A restore refused the image for good.
    RestoreRefused,
    /// The vCPUs stand still.
    Frozen,
    /// They don't.
    FreezeFailed,
    /// The image is on disk.
    Persisted,
    /// It is not.
    PersistFailed,
    /// The row says asleep.
    PauseCommitted,
    /// The row does not, because the store failed or the lease that wanted the pause was moved.
    PauseNotCommitted,
    /// A frozen guest runs again.
    Ran,
    /// It runs again, with a snapshot taken or not.
    Captured,
    /// It sleeps on, with a snapshot taken or not.
    Copied,
    /// The VMM of a sleeping machine is gone.
    Evicted,
    /// The guest powered itself off.
    ShutDown,
    /// The guest asked for a reset.
    Rebooted,
    /// The VMM is gone, and the image still fits the disk.
    LostImageKept,
    /// The VMM is gone, and no image fits the disk.
    LostImageGone,
    /// Files and row are gone.
    Deleted,
    /// They are not.
    DeleteFailed,
}

/// What a driver does, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Commit that it runs, in which execution, and start its lease.
    CommitRunning,
    /// Commit that it sleeps on the image that there is.
    CommitPaused,
    /// Commit that its image was refused.
    CommitRefused,
    /// Commit that it has no memory.
    CommitStopped,
    /// End the VMM that was found.
    QuitExecution,
    /// Give up the memory, then boot.
    Boot,
    /// Restore from the image.
    Restore,
    /// Let requests in flight end, then stop the vCPUs.
    Freeze,
    /// Write the image.
    Persist,
    /// Commit that it sleeps, unless its lease was moved meanwhile.
    CommitPause,
    /// Set the guest free.
    Run,
    /// Stop the vCPUs, take a snapshot, set the guest free.
    Capture,
    /// Take a snapshot of the files.
    Copy,
    /// End the VMM.
    Evict,
    /// Commit the deletion, end the VMM, remove files and row. Joins a deletion under way.
    Delete,
}

/// Why an event changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Denied {
    /// Something else is under way that ends by itself.
    #[error("another operation is under way")]
    Busy,
    /// It has no meaning here.
    #[error("the operation has no meaning in this state")]
    NotReady,
    /// The image was refused before and is not tried again by itself.
    #[error("the hibernation image was refused")]
    ImageRefused,
    /// The machine is being deleted.
    #[error("the machine is being deleted")]
    Deleting,
    /// The outcome of an operation that this state does not wait for: a defect of the driver.
    #[error("an outcome came out of turn")]
    OutOfTurn,
}

/// What a machine becomes and what is then done.
pub type Step = (State, &'static [Effect]);

/// What becomes of a machine in `state` when `event` happens.
///
/// # Errors
/// The event is denied, and nothing changes.
pub fn next(state: State, event: Event) -> Result<Step, Denied> {
    use Event::*;
    match event {
        Wake => wake(state),
        Resume => match state {
            State::Refused => Ok((State::Waking, &[Effect::Restore])),
            other => wake(other),
        },
        BootFromDisk => boot_from_disk(state),
        Pause => pause(state),
        Snapshot => snapshot(state),
        Delete => match state {
            State::Gone => Err(Denied::Deleting),
            State::Creating
            | State::Starting
            | State::Running
            | State::Capturing
            | State::Freezing
            | State::Persisting
            | State::Durable
            | State::Evicting
            | State::Paused
            | State::Copying
            | State::Refused
            | State::Waking
            | State::Stopped
            | State::Deleting => Ok((State::Deleting, &[Effect::Delete])),
        },
        Booted | BootFailed | Restored | RestoreFailed | RestoreRefused | Frozen | FreezeFailed
        | Persisted | PersistFailed | PauseCommitted | PauseNotCommitted | Ran | Captured | Copied
        | Evicted | Deleted | DeleteFailed => outcome(state, event),
        ShutDown => ended(state, (State::Stopped, &[Effect::CommitStopped])),
        Rebooted => ended(state, (State::Starting, &[Effect::Boot])),
        LostImageKept => ended(state, (State::Paused, &[Effect::CommitPaused])),
        LostImageGone => ended(state, (State::Stopped, &[Effect::CommitStopped])),
    }
}

fn wake(state: State) -> Result<Step, Denied> {
    match state {
        // Already there or on the way: the caller joins whoever waits. An eviction takes milliseconds, and the
        // image is complete; the driver wakes it again right after.
        State::Running | State::Creating | State::Starting | State::Waking | State::Evicting => {
            Ok((state, &[]))
        }
        // Likewise: a snapshot holds the guest for a moment, and is not given up for a request that can wait for it.
        State::Capturing | State::Copying => Ok((state, &[])),
        State::Freezing | State::Persisting | State::Durable => Ok((State::Waking, &[Effect::Run])),
        State::Paused => Ok((State::Waking, &[Effect::Restore])),
        State::Stopped => Ok((State::Starting, &[Effect::Boot])),
        State::Refused => Err(Denied::ImageRefused),
        State::Deleting | State::Gone => Err(Denied::Deleting),
    }
}

fn boot_from_disk(state: State) -> Result<Step, Denied> {
    match state {
        State::Paused | State::Refused | State::Stopped => Ok((State::Starting, &[Effect::Boot])),
        State::Starting => Ok((state, &[])),
        State::Creating
        | State::Capturing
        | State::Copying
        | State::Freezing
        | State::Persisting
        | State::Durable
        | State::Evicting
        | State::Waking => Err(Denied::Busy),
        State::Running => Err(Denied::NotReady),
        State::Deleting | State::Gone => Err(Denied::Deleting),
    }
}

fn pause(state: State) -> Result<Step, Denied> {
    match state {
        State::Running => Ok((State::Freezing, &[Effect::Freeze])),
        State::Freezing
        | State::Persisting
        | State::Durable
        | State::Evicting
        | State::Paused
        | State::Copying
        | State::Refused => Ok((state, &[])),
        State::Creating | State::Starting | State::Waking | State::Capturing => Err(Denied::Busy),
        State::Stopped => Err(Denied::NotReady),
        State::Deleting | State::Gone => Err(Denied::Deleting),
    }
}

fn snapshot(state: State) -> Result<Step, Denied> {
    match state {
        State::Running => Ok((State::Capturing, &[Effect::Capture])),
        State::Paused => Ok((State::Copying, &[Effect::Copy])),
        State::Creating
        | State::Starting
        | State::Capturing
        | State::Freezing
        | State::Persisting
        | State::Durable
        | State::Evicting
        | State::Copying
        | State::Waking => Err(Denied::Busy),
        // There is no memory, or none that can be used.
        State::Refused | State::Stopped => Err(Denied::NotReady),
        State::Deleting | State::Gone => Err(Denied::Deleting),
    }
}

/// Each outcome belongs to exactly one state, or to the two that boot.
fn outcome(state: State, event: Event) -> Result<Step, Denied> {
    use Effect as E;
    let (awaited_in, step): (&[State], Step) = match event {
        Event::Booted => (
            &[State::Creating, State::Starting],
            (State::Running, &[E::CommitRunning]),
        ),
        // Nobody was told of a machine that is being created, so nothing of it stays.
        Event::BootFailed if state == State::Creating => {
            (&[State::Creating], (State::Deleting, &[E::Delete]))
        }
        Event::BootFailed => (&[State::Starting], (State::Stopped, &[E::CommitStopped])),
        Event::Restored | Event::Ran => (&[State::Waking], (State::Running, &[E::CommitRunning])),
        Event::RestoreFailed => (&[State::Waking], (State::Paused, &[])),
        Event::RestoreRefused => (&[State::Waking], (State::Refused, &[E::CommitRefused])),
        Event::Frozen => (&[State::Freezing], (State::Persisting, &[E::Persist])),
        // The guest may run already; running it again makes sure of it.
        Event::FreezeFailed => (&[State::Freezing], (State::Waking, &[E::Run])),
        Event::Persisted => (&[State::Persisting], (State::Durable, &[E::CommitPause])),
        Event::PersistFailed => (&[State::Persisting], (State::Waking, &[E::Run])),
        Event::PauseCommitted => (&[State::Durable], (State::Evicting, &[E::Evict])),
        Event::PauseNotCommitted => (&[State::Durable], (State::Waking, &[E::Run])),
        Event::Captured => (&[State::Capturing], (State::Running, &[])),
        Event::Copied => (&[State::Copying], (State::Paused, &[])),
        Event::Evicted => (&[State::Evicting], (State::Paused, &[])),
        Event::Deleted => (&[State::Deleting], (State::Gone, &[])),
        Event::DeleteFailed => (&[State::Deleting], (State::Deleting, &[])),
        Event::Wake
        | Event::Resume
        | Event::BootFromDisk
        | Event::Pause
        | Event::Snapshot
        | Event::Delete
        | Event::ShutDown
        | Event::Rebooted
        | Event::LostImageKept
        | Event::LostImageGone => (&[], (state, &[])),
    };
    if awaited_in.contains(&state) {
        Ok(step)
    } else {
        Err(Denied::OutOfTurn)
    }
}

/// The guest or its VMM ended by itself.
fn ended(state: State, step: Step) -> Result<Step, Denied> {
    match state {
        State::Running
        | State::Capturing
        | State::Freezing
        | State::Persisting
        | State::Durable
        | State::Waking => Ok(step),
        // No execution was handed over yet, or it is being ended on purpose.
        State::Creating
        | State::Starting
        | State::Evicting
        | State::Paused
        | State::Copying
        | State::Refused
        | State::Stopped
        | State::Deleting
        | State::Gone => Err(Denied::OutOfTurn),
    }
}

impl State {
    /// All of them, in the order of a life.
    pub const ALL: [Self; 15] = [
        Self::Creating,
        Self::Starting,
        Self::Running,
        Self::Capturing,
        Self::Freezing,
        Self::Persisting,
        Self::Durable,
        Self::Evicting,
        Self::Paused,
        Self::Copying,
        Self::Refused,
        Self::Waking,
        Self::Stopped,
        Self::Deleting,
        Self::Gone,
    ];

    /// What users see.
    #[must_use]
    pub fn status(self) -> MachineStatus {
        match self {
            Self::Creating | Self::Starting => MachineStatus::Starting,
            Self::Running | Self::Capturing => MachineStatus::Running,
            Self::Freezing | Self::Persisting | Self::Durable => MachineStatus::Pausing,
            Self::Evicting | Self::Paused | Self::Copying | Self::Refused => MachineStatus::Paused,
            Self::Waking => MachineStatus::Waking,
            Self::Stopped => MachineStatus::Stopped,
            Self::Deleting | Self::Gone => MachineStatus::Deleting,
        }
    }

    /// Nothing runs and nothing is under way: no task is needed for it.
    #[must_use]
    pub fn is_at_rest(self) -> bool {
        match self {
            Self::Paused | Self::Refused | Self::Stopped | Self::Gone => true,
            Self::Creating
            | Self::Starting
            | Self::Running
            | Self::Capturing
            | Self::Freezing
            | Self::Persisting
            | Self::Durable
            | Self::Evicting
            | Self::Copying
            | Self::Waking
            | Self::Deleting => false,
        }
    }
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 27] = [
        Self::Wake,
        Self::Resume,
        Self::BootFromDisk,
        Self::Pause,
        Self::Snapshot,
        Self::Delete,
        Self::Booted,
        Self::BootFailed,
        Self::Restored,
        Self::RestoreFailed,
        Self::RestoreRefused,
        Self::Frozen,
        Self::FreezeFailed,
        Self::Persisted,
        Self::PersistFailed,
        Self::PauseCommitted,
        Self::PauseNotCommitted,
        Self::Ran,
        Self::Captured,
        Self::Copied,
        Self::Evicted,
        Self::ShutDown,
        Self::Rebooted,
        Self::LostImageKept,
        Self::LostImageGone,
        Self::Deleted,
        Self::DeleteFailed,
    ];
}

#[cfg(test)]
mod tests;
