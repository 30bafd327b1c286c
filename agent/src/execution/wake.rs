//! The last steps of a restore: the VMM's reply and the guest's acknowledgement, waited for together.

use std::pin::pin;

use torpor_api::ErrorCode;
use torpor_api::vmm::{RestoreTrace, VmmErrorCode};

use crate::guest_client::{GuestClient, GuestClientError, Resynced};
use crate::machine::hypervisor::{HypervisorError, MachineSpec};
use crate::vmm_client::VmmClientError;

/// Which of the two failed.
pub(super) enum RestoreFailure {
    Vmm(VmmClientError),
    Guest(GuestClientError),
}

/// The VMM's reply and the guest's acknowledgement, waited for together. A guest that can't be reached because
/// the restore failed is not the cause to report.
pub(super) async fn finish(
    restored: impl Future<Output = Result<(RestoreTrace, u64), VmmClientError>>,
    guest: &GuestClient,
) -> Result<(RestoreTrace, u64), RestoreFailure> {
    let (mut restored, mut resynced) = (pin!(restored), pin!(guest.resync()));
    let mut early: Option<Result<Resynced, GuestClientError>> = None;
    let trace = loop {
        tokio::select! {
            trace = &mut restored => break trace.map_err(RestoreFailure::Vmm)?,
            answer = &mut resynced, if early.is_none() => early = Some(answer),
        }
    };
    let answer = match early {
        Some(answer) => answer,
        None => resynced.await,
    };
    match answer {
        Ok(resynced) => {
            tracing::debug!(step_ns = resynced.step_ns, "guest acknowledged clock and entropy");
            Ok(trace)
        }
        Err(error) => Err(RestoreFailure::Guest(error)),
    }
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
