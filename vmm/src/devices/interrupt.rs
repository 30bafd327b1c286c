//! A device's interrupt: the status register and the irqfd.
//!
//! Lock-free, because the guest's handler reads and acknowledges the status on every interrupt and must not
//! wait for a disk request that holds the device.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A queue was used.
const USED_BUFFER: u32 = 1;
/// Configuration or status changed.
const CONFIG_CHANGE: u32 = 2;

/// Interrupt status and line of one device.
#[derive(Debug)]
pub(crate) struct Interrupt {
    status: AtomicU32,
    line: EventFd,
}

impl Interrupt {
    /// Nothing pending.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            status: AtomicU32::new(0),
            line: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// For the irqfd.
    pub(crate) fn line(&self) -> &EventFd {
        &self.line
    }

    /// The guest has completions to look at.
    pub(crate) fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// The guest has configuration or status to look at.
    pub(crate) fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// The status register.
    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// The guest saw these.
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Replaces the status: a reset or a restore.
    pub(crate) fn set_status(&self, bits: u32) {
        self.status
            .store(bits & (USED_BUFFER | CONFIG_CHANGE), Ordering::Release);
    }

    /// Raises the line again for what was not acknowledged before the image was made.
    pub(crate) fn raise_pending(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::AcqRel);
        // Fails only when the counter is full, and then the line is raised.
        if let Err(error) = self.line.write(1) {
            tracing::debug!(%error, "interrupt already raised");
        }
    }
}
