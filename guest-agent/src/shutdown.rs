//! The switch that ends the machine: anyone may throw it, the main thread acts on it.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;

/// How the machine is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Power off.
    PowerOff,
    /// Come back.
    Reboot,
}

/// Thrown once; later throws change nothing.
#[derive(Debug)]
pub struct Shutdown {
    ending: OnceLock<Ending>,
    thrown: EventFd,
}

impl Shutdown {
    /// Not thrown.
    pub fn new() -> io::Result<Self> {
        let thrown = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self {
            ending: OnceLock::new(),
            thrown,
        })
    }

    /// End the machine.
    pub fn throw(&self, ending: Ending) {
        let _ = self.ending.set(ending);
        let _ = self.thrown.write(1);
    }

    /// How it is to end, if it is.
    pub fn ending(&self) -> Option<Ending> {
        self.ending.get().copied()
    }
}

impl AsFd for Shutdown {
    /// Readable once thrown.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.thrown.as_fd()
    }
}
