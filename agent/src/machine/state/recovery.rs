//! What a row says, and what becomes of a machine that a starting torpord finds. As pure as the table.

use super::{Effect, State, Step};
use torpor_api::vmm::VmmState;

/// What a row says of its machine. Every other state is known only to the driver, and lost with torpord.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Committed {
    /// Its create was never answered.
    Creating,
    /// It ran.
    Running,
    /// It slept.
    Paused,
    /// It slept on an image that was refused.
    Refused,
    /// It was off.
    Stopped,
    /// Its deletion had begun.
    Deleting,
}

impl Committed {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Creating,
        Self::Running,
        Self::Paused,
        Self::Refused,
        Self::Stopped,
        Self::Deleting,
    ];

    /// As it stands in the row.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Refused => "refused",
            Self::Stopped => "stopped",
            Self::Deleting => "deleting",
        }
    }

    /// The state in which a driver takes the machine up when nothing of it runs.
    #[must_use]
    pub fn at_rest(self) -> State {
        match self {
            Self::Creating => State::Creating,
            Self::Running | Self::Stopped => State::Stopped,
            Self::Paused => State::Paused,
            Self::Refused => State::Refused,
            Self::Deleting => State::Deleting,
        }
    }
}

/// Whether the machine's image could be resumed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Image {
    /// Complete, and the disk is of the same instant.
    Fits,
    /// Missing, damaged or older than the disk.
    Unusable,
}

/// What becomes of a machine that a starting torpord finds: by its row, its VMM if one answers, and its image.
#[must_use]
pub fn recover(row: Committed, vmm: Option<VmmState>, image: Image) -> Step {
    match (row, vmm) {
        // Half made or half deleted: finish the one way that is left.
        (Committed::Creating | Committed::Deleting, _) => (State::Deleting, &[Effect::Delete]),
        (_, Some(VmmState::Running)) => (State::Running, &[Effect::CommitRunning]),
        // Nobody pauses by accident: a pause that was not committed is undone.
        (_, Some(VmmState::Frozen | VmmState::Persisting)) => (State::Waking, &[Effect::Run]),
        // The row may be of the pause before; committing again is right in both cases.
        (Committed::Paused, Some(VmmState::Durable)) => (State::Durable, &[Effect::CommitPause]),
        (Committed::Running | Committed::Refused | Committed::Stopped, Some(VmmState::Durable)) => {
            (State::Waking, &[Effect::Run])
        }
        (_, Some(VmmState::Blank | VmmState::Dozing | VmmState::Exited)) => match (row, image) {
            (Committed::Running, Image::Fits) => {
                (State::Paused, &[Effect::QuitExecution, Effect::CommitPaused])
            }
            (Committed::Running, Image::Unusable) => {
                (State::Stopped, &[Effect::QuitExecution, Effect::CommitStopped])
            }
            (other, _) => (other.at_rest(), &[Effect::QuitExecution]),
        },
        (Committed::Running, None) => match image {
            Image::Fits => (State::Paused, &[Effect::CommitPaused]),
            Image::Unusable => (State::Stopped, &[Effect::CommitStopped]),
        },
        (Committed::Paused | Committed::Refused | Committed::Stopped, None) => (row.at_rest(), &[]),
    }
}
