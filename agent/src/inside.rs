//! The inside of a machine: its processes, terminals, files and figures.
//!
//! An [`Inside`] is a machine and who asks; it holds nothing. Everything here waits for the guest, which is woken
//! if the wake switch of the one who asks is on, except what is said not to wake. Nothing here keeps a machine
//! from pausing for longer than one short request; what lasts ([`session`], [`files`] in transit) is taken up again
//! after a wake, or fails with `guest_unreachable` where that cannot be.
//!
//! Not its job: HTTP, SSH, what a pause means. The native API, the façades and the SSH gateway are built on this.

pub mod connect;
pub mod files;
pub mod processes;
pub mod session;
pub mod usage;

use crate::guest_client::GuestClientError;
use crate::machine::error::{MachineError, chain};
use crate::machine::fleet::{Fleet, Presence, WakeSource};
use torpor_api::guest::GuestErrorCode;
use torpor_api::{ErrorCode, MachineId};

/// A machine, seen from the inside, and who looks.
#[derive(Clone)]
pub struct Inside {
    fleet: Fleet,
    machine: MachineId,
    source: WakeSource,
}

impl Fleet {
    /// The inside of a machine, for somebody whose wake switch is this one.
    #[must_use]
    pub fn inside(&self, machine: MachineId, source: WakeSource) -> Inside {
        Inside {
            fleet: self.clone(),
            machine,
            source,
        }
    }
}

impl Inside {
    /// Whose inside this is.
    #[must_use]
    pub fn machine(&self) -> &MachineId {
        &self.machine
    }

    /// Have the machine awake, for what does not wake it.
    ///
    /// # Errors
    /// The wake's.
    pub async fn awaken(&self) -> Result<(), MachineError> {
        self.presence("awaken").await.map(drop)
    }

    async fn presence(&self, operation: &str) -> Result<Presence, MachineError> {
        let cause = serde_json::json!({ "operation": operation });
        self.fleet.presence(&self.machine, self.source, cause).await
    }

    async fn presence_if_awake(&self) -> Result<Presence, MachineError> {
        self.fleet.presence_if_awake(&self.machine).await
    }
}

/// What an error of the agent is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    /// Starting a command.
    Exec,
    /// A process that was started before.
    Process,
    /// Files.
    File,
}

/// The agent's error as callers get to see it.
fn failed(about: About) -> impl Fn(GuestClientError) -> MachineError {
    move |error| {
        let code = match &error {
            GuestClientError::Refused { source } => code_of(about, source.code),
            _ => ErrorCode::GuestUnreachable,
        };
        let message = match &error {
            // The agent says what it tried on what, and needs no preface.
            GuestClientError::Refused { source } => source.message.clone(),
            _ => format!("cannot reach the guest agent: {}", chain(&error)),
        };
        MachineError::new(code, message)
    }
}

fn code_of(about: About, code: GuestErrorCode) -> ErrorCode {
    match (about, code) {
        (About::Exec, GuestErrorCode::Os) => ErrorCode::GuestUnreachable,
        (About::Exec, _) => ErrorCode::ExecFailed,
        (About::Process, GuestErrorCode::NotFound) => ErrorCode::ProcessNotFound,
        (About::File, GuestErrorCode::NotFound) => ErrorCode::FileNotFound,
        (_, GuestErrorCode::BadRequest) => ErrorCode::InvalidRequest,
        (_, GuestErrorCode::PermissionDenied) => ErrorCode::FilePermissionDenied,
        (_, GuestErrorCode::Conflict) => ErrorCode::FileConflict,
        (_, GuestErrorCode::NoSpace) => ErrorCode::GuestDiskFull,
        (About::File, GuestErrorCode::Os | GuestErrorCode::ExecFailed) => ErrorCode::FileFailed,
        (About::Process, GuestErrorCode::Os | GuestErrorCode::ExecFailed) => ErrorCode::GuestUnreachable,
    }
}

#[cfg(test)]
pub(crate) mod tests;
