//! The one error of operations on machines; clonable, because one outcome answers every waiter.

use super::admission::NotAdmitted;
use super::hypervisor::HypervisorError;
use super::state::Denied;
use crate::store::StoreError;
use std::fmt;
use torpor_api::{ErrorCode, MachineId};

/// Why an operation on a machine did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct MachineError {
    /// Stable code.
    pub code: ErrorCode,
    /// Operation, operands and causes.
    pub message: String,
}

impl MachineError {
    /// An error with this code.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// No machine is known by this text.
    #[must_use]
    pub fn not_found(text: impl fmt::Display) -> Self {
        Self::new(ErrorCode::MachineNotFound, format!("no machine {text}"))
    }

    /// What a denied event means to the caller who asked for `operation`.
    #[must_use]
    pub fn denied(id: &MachineId, operation: &str, denied: Denied) -> Self {
        let code = match denied {
            Denied::Busy => ErrorCode::TransitionInProgress,
            Denied::NotReady => ErrorCode::MachineNotReady,
            Denied::ImageRefused => ErrorCode::ImageCorrupt,
            Denied::Deleting => ErrorCode::MachineNotFound,
            Denied::OutOfTurn => ErrorCode::Internal,
        };
        Self::new(code, format!("cannot {operation} machine {id}: {denied}"))
    }
}

impl From<HypervisorError> for MachineError {
    fn from(error: HypervisorError) -> Self {
        Self {
            code: error.code,
            message: chain(&error),
        }
    }
}

impl From<NotAdmitted> for MachineError {
    fn from(error: NotAdmitted) -> Self {
        Self::new(ErrorCode::CapacityExceeded, error.to_string())
    }
}

impl From<StoreError> for MachineError {
    fn from(error: StoreError) -> Self {
        Self {
            code: error.code(),
            message: chain(&error),
        }
    }
}

/// The error and its causes on one line.
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
