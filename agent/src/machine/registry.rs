//! Which machines have a driver, and the way to it.
//!
//! One short lock, never held across an await. A driver leaves only in the moment in which its queue is empty, and
//! under this lock, so a command is either taken by the driver that it was sent to or comes back unanswered
//! and is sent again.

use super::driver::{Command, Live};
use super::gate::Gate;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, watch};
use torpor_api::MachineId;

/// The way to a machine's driver.
#[derive(Clone)]
pub struct Handle {
    /// Its queue.
    pub commands: mpsc::Sender<Command>,
    /// What it shows.
    pub live: watch::Receiver<Live>,
    /// The way into its machine.
    pub gate: Arc<Gate>,
}

/// All handles.
#[derive(Default)]
pub struct Registry {
    handles: Mutex<HashMap<MachineId, Handle>>,
}

impl Registry {
    /// The machine's handle, if it has a driver.
    #[must_use]
    pub fn find(&self, id: &MachineId) -> Option<Handle> {
        self.lock().get(id).cloned()
    }

    /// The machine's handle, made by `start` if it has none.
    pub fn find_or(&self, id: &MachineId, start: impl FnOnce() -> Handle) -> Handle {
        self.lock().entry(id.clone()).or_insert_with(start).clone()
    }

    /// Take the machine's handle out, if `idle` says so under the lock.
    pub fn leave(&self, id: &MachineId, idle: impl FnOnce() -> bool) -> bool {
        let mut handles = self.lock();
        let leaves = idle();
        if leaves {
            handles.remove(id);
        }
        leaves
    }

    /// Number of machines with a driver.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// No machine has a driver.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every handle.
    #[must_use]
    pub fn all(&self) -> Vec<(MachineId, Handle)> {
        self.lock()
            .iter()
            .map(|(id, handle)| (id.clone(), handle.clone()))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MachineId, Handle>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
