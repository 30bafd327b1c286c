//! The last steps of a restore: the VMM's reply and the guest's acknowledgement.

use std::time::Duration;

use torpor_api::ErrorCode;
use torpor_api::vmm::{RestoreTrace, VmmErrorCode};

use crate::guest_client::channel::Channel;
use crate::guest_client::{GuestClient, GuestClientError};
use crate::machine::hypervisor::{HypervisorError, MachineSpec};
use crate::vmm_client::VmmClientError;

/// Which of the two failed.
pub(super) enum RestoreFailure {
    Vmm(VmmClientError),
    Guest(GuestClientError),
}

/// The VMM's reply and then the guest's acknowledgement, by a connection that is made beside the restore and returned open:
/// its end would cost the guest as much as its beginning, and just when it has a request to answer.
pub(super) async fn finish(
    restored: impl Future<Output = Result<(RestoreTrace, u64), VmmClientError>>,
    guest: &GuestClient,
) -> Result<((RestoreTrace, u64), Channel), RestoreFailure> {
    let (restored, knocked) = tokio::join!(restored, guest.knock());
    // A guest that can't be reached because the restore failed is not the cause to report.
    let trace = restored.map_err(RestoreFailure::Vmm)?;
    let mut channel = knocked.map_err(RestoreFailure::Guest)?;
    let resynced = guest.resync(&mut channel).await.map_err(RestoreFailure::Guest)?;
    tracing::debug!(step_ns = resynced.step_ns, "guest acknowledged clock and entropy");
    Ok((trace, channel))
}

/// How long the guest has the processors for itself after a wake: the first response is likely to be out by then.
const ANSWER_QUIET: Duration = Duration::from_secs(1);

/// Drop what a start needs no more, but not beside the guest's first answer.
pub(super) fn drop_after_answer(spent: impl Send + 'static) {
    tokio::spawn(async move {
        tokio::time::sleep(ANSWER_QUIET).await;
        drop(spent);
    });
}

pub(super) fn error(machine: &MachineSpec, failure: RestoreFailure) -> HypervisorError {
    match failure {
        RestoreFailure::Vmm(error) => {
            let code = match &error {
                VmmClientError::Refused { source, .. } => match source.code {
                    VmmErrorCode::ImageCorrupt => ErrorCode::ImageCorrupt,
                    VmmErrorCode::ImageIncompatible => ErrorCode::ImageIncompatible,
                    _ => ErrorCode::ResumeFailed,
                },
                _ => ErrorCode::ResumeFailed,
            };
            HypervisorError::new(code, format!("VMM cannot restore {}", machine.id)).because(error)
        }
        RestoreFailure::Guest(error) => {
            let message = format!("guest of {} did not acknowledge clock and entropy", machine.id);
            HypervisorError::new(ErrorCode::ResumeFailed, message).because(error)
        }
    }
}
