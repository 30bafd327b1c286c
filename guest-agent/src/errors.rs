//! From the errors of the modules to the error that the host gets: the only place that picks codes.

use crate::accounts::AccountError;
use crate::children::SignalError;
use crate::exec::ExecError;
use crate::files::FileError;
use crate::log::chain;
use crate::resync::ResyncError;
use crate::sys::spawn::Step;
use crate::wire::{WireError, error};
use std::io;
use torpor_api::guest::{GuestError, GuestErrorCode};

fn code_of(source: &io::Error) -> GuestErrorCode {
    match source.kind() {
        io::ErrorKind::NotFound => GuestErrorCode::NotFound,
        io::ErrorKind::PermissionDenied => GuestErrorCode::PermissionDenied,
        io::ErrorKind::AlreadyExists
        | io::ErrorKind::DirectoryNotEmpty
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::NotADirectory => GuestErrorCode::Conflict,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => GuestErrorCode::NoSpace,
        _ => GuestErrorCode::Os,
    }
}

/// An operating-system error while doing something that has no error type of its own.
pub fn os(operation: &str, source: &io::Error) -> GuestError {
    error(code_of(source), format!("{operation}: {source}"))
}

impl From<FileError> for Failed {
    fn from(cause: FileError) -> Self {
        let code = match &cause {
            FileError::Path { source, .. } | FileError::Move { source, .. } => code_of(source),
            FileError::NotAFile { .. } => GuestErrorCode::Conflict,
            FileError::Account(AccountError::Unknown(_)) => GuestErrorCode::NotFound,
            FileError::Account(AccountError::Read { .. }) | FileError::Become { .. } => GuestErrorCode::Os,
            FileError::BadPath { .. }
            | FileError::BadMode(_)
            | FileError::AppendAt
            | FileError::Wire(_)
            | FileError::UnexpectedFrame(_) => GuestErrorCode::BadRequest,
        };
        Self(error(code, chain(&cause)))
    }
}

impl From<ExecError> for Failed {
    fn from(cause: ExecError) -> Self {
        let code = match &cause {
            ExecError::BadSpec(_) | ExecError::Protocol(_) => GuestErrorCode::BadRequest,
            ExecError::Account(AccountError::Unknown(_)) | ExecError::NoProcess(_) => {
                GuestErrorCode::NotFound
            }
            ExecError::Account(AccountError::Read { .. }) | ExecError::Os { .. } => GuestErrorCode::Os,
            ExecError::Start {
                step: Step::Directory,
                source,
                ..
            } => code_of(source),
            ExecError::Start { .. } => GuestErrorCode::ExecFailed,
        };
        Self(error(code, chain(&cause)))
    }
}

impl From<SignalError> for Failed {
    fn from(cause: SignalError) -> Self {
        let code = match &cause {
            SignalError::Unknown(_) => GuestErrorCode::NotFound,
            SignalError::NoSignal(_) => GuestErrorCode::BadRequest,
            SignalError::Refused { .. } => GuestErrorCode::Os,
        };
        Self(error(code, chain(&cause)))
    }
}

impl From<ResyncError> for Failed {
    fn from(cause: ResyncError) -> Self {
        let code = match &cause {
            ResyncError::BadEntropy(_) | ResyncError::BadTime(_) => GuestErrorCode::BadRequest,
            ResyncError::Clock(_) | ResyncError::Random(_) => GuestErrorCode::Os,
        };
        Self(error(code, chain(&cause)))
    }
}

impl From<WireError> for Failed {
    fn from(cause: WireError) -> Self {
        Self(error(GuestErrorCode::BadRequest, chain(&cause)))
    }
}

impl From<GuestError> for Failed {
    fn from(cause: GuestError) -> Self {
        Self(cause)
    }
}

/// An operation that failed: what the host is told.
#[derive(Debug)]
pub struct Failed(pub GuestError);
