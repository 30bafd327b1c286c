//! Who waits for a machine to run without wanting to wake it.
//!
//! A session whose machine fell asleep goes on when somebody else wakes it. Being told is no promise: whoever is
//! told looks for himself, and waits again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::Notify;
use torpor_api::MachineId;

/// Beyond so many entries those that nobody waits for are thrown out.
const SWEPT_ABOVE: usize = 1024;

/// Everybody who waits.
#[derive(Default)]
pub struct Dawn(Mutex<HashMap<MachineId, Weak<Notify>>>);

impl Dawn {
    /// What tells of this machine. Ask it for a notification before looking at the machine.
    #[must_use]
    pub fn of(&self, id: &MachineId) -> Arc<Notify> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() > SWEPT_ABOVE {
            waiting.retain(|_, notify| notify.strong_count() > 0);
        }
        if let Some(notify) = waiting.get(id).and_then(Weak::upgrade) {
            return notify;
        }
        let notify = Arc::new(Notify::new());
        waiting.insert(id.clone(), Arc::downgrade(&notify));
        notify
    }

    /// The machine runs, or will never again.
    pub fn tell(&self, id: &MachineId) {
        let told = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        if let Some(notify) = told.and_then(|notify| notify.upgrade()) {
            notify.notify_waiters();
        }
    }
}
