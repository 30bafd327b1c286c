//! Errors of the machine, and the codes that torpord gets for them.

use crate::arch::ArchError;
use crate::devices::DeviceError;
use crate::image::OpenError;
use crate::image::persist::PersistError;
use crate::layout::BadMemorySize;
use crate::memory::MemoryError;
use crate::memory::lazy::FillError;
use crate::vcpu::VcpuError;
use std::io;
use torpor_api::vmm::{FdRole, VmmError, VmmErrorCode, VmmState};

/// Why the machine did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Not in this state.
    #[error("cannot {operation} a machine that is {state:?}")]
    NotInThisState {
        /// What was asked.
        operation: &'static str,
        /// Where it stands.
        state: VmmState,
    },
    /// Frozen without its state: a defect.
    #[error("no state was taken at the freeze")]
    NothingFrozen,
    /// What a dozing machine had laid out is not all there any more.
    #[error("memory of the dozing machine has left the page cache")]
    Evicted,
    /// A descriptor is missing.
    #[error("the request needs the descriptor {0:?}")]
    MissingFd(FdRole),
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs are outside the limits")]
    BadVcpuCount(u8),
    /// The memory size is out of range.
    #[error(transparent)]
    BadMemorySize(#[from] BadMemorySize),
    /// KVM is not there, or too old.
    #[error("cannot {operation}")]
    Kvm {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The architecture's part.
    #[error(transparent)]
    Arch(#[from] ArchError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The image.
    #[error(transparent)]
    Image(#[from] OpenError),
    /// The working set can't be put in place.
    #[error("cannot put the working set in place")]
    Prefetch(#[from] FillError),
    /// The image belongs to an older disk.
    #[error("disk has generation {found}, the image belongs to {wanted}")]
    DiskGeneration {
        /// Of the disk.
        found: u64,
        /// Of the image.
        wanted: u64,
    },
    /// The state is not what this VMM writes.
    #[error("cannot decode the machine state")]
    DecodeState(#[source] postcard::Error),
    /// Encoding failed.
    #[error("cannot encode the machine state")]
    EncodeState(#[source] postcard::Error),
    /// The state is of another number of vCPUs.
    #[error("state has {found} vCPUs, the VM has {wanted}")]
    StateVcpus {
        /// In the state.
        found: usize,
        /// Prepared.
        wanted: usize,
    },
    /// The image file can't be examined.
    #[error("cannot examine the image file")]
    ImageFile(#[source] io::Error),
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// No event descriptor.
    #[error("cannot create an event descriptor")]
    EventFd(#[source] io::Error),
    /// The kick signal or random bytes.
    #[error("cannot {operation}")]
    Process {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The dump.
    #[error("cannot write the dump")]
    Dump(#[source] io::Error),
    /// The process can't be locked in.
    #[error(transparent)]
    Seccomp(#[from] crate::seccomp::SeccompError),
}

/// An error with its causes, in one line.
#[must_use]
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

impl VmError {
    fn code(&self) -> VmmErrorCode {
        match self {
            Self::NotInThisState { .. }
            | Self::NothingFrozen
            | Self::MissingFd(_)
            | Self::BadVcpuCount(_)
            | Self::BadMemorySize(_)
            | Self::Evicted => VmmErrorCode::BadRequest,
            Self::Kvm { .. } | Self::Vcpu(_) | Self::Arch(_) => VmmErrorCode::Kvm,
            Self::Image(error) if error.is_incompatible() => VmmErrorCode::ImageIncompatible,
            Self::Image(OpenError::Read { .. }) => VmmErrorCode::Io,
            Self::Image(_)
            | Self::Prefetch(_)
            | Self::DiskGeneration { .. }
            | Self::DecodeState(_)
            | Self::StateVcpus { .. } => VmmErrorCode::ImageCorrupt,
            Self::Memory(_)
            | Self::Device(_)
            | Self::EncodeState(_)
            | Self::ImageFile(_)
            | Self::Thread(_)
            | Self::EventFd(_)
            | Self::Process { .. }
            | Self::Seccomp(_)
            | Self::Dump(_) => VmmErrorCode::Io,
        }
    }
}

impl From<&VmError> for VmmError {
    fn from(error: &VmError) -> Self {
        Self {
            code: error.code(),
            message: chain(error),
        }
    }
}

impl From<&PersistError> for VmmError {
    fn from(error: &PersistError) -> Self {
        let code = match error {
            PersistError::Cancelled => VmmErrorCode::Cancelled,
            PersistError::DiskFull { .. } => VmmErrorCode::DiskFull,
            PersistError::Source(_) => VmmErrorCode::ImageCorrupt,
            PersistError::Io { .. } | PersistError::StateTooLarge { .. } | PersistError::Header(_) => {
                VmmErrorCode::Io
            }
        };
        Self {
            code,
            message: chain(error),
        }
    }
}
