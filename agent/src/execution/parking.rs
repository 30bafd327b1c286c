//! Network slots of machines that sleep while somebody keeps a connection to them open.
//!
//! A parked slot has its namespace, its tap and the host's ends of the connections, and no guest. The machine's next
//! execution gets it back and finds its connections as it left them; packets that came meanwhile wait in the tap.
//! At most so many are parked; the oldest is given up for the next, and whoever parked it is told.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;
use torpor_api::MachineId;

use crate::net::SlotLease;

struct Parked {
    machine: MachineId,
    slot: Arc<SlotLease>,
    lost: CancellationToken,
}

/// All parked slots of this host.
pub(super) struct Parking {
    most: usize,
    /// Oldest first.
    parked: Mutex<Vec<Parked>>,
}

impl Parking {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            parked: Mutex::default(),
        })
    }

    /// Keep a slot for the machine's next execution; `lost` is cancelled if it is given up before.
    pub(super) fn park(&self, machine: MachineId, slot: Arc<SlotLease>, lost: CancellationToken) {
        self.release(&machine);
        self.parked().push(Parked { machine, slot, lost });
        while self.parked().len() > self.most {
            self.release_oldest();
        }
    }

    /// The machine's parked slot, again one that ends with its holder.
    pub(super) fn take(&self, machine: &MachineId) -> Option<Arc<SlotLease>> {
        let mut parked = self.parked();
        let place = parked.iter().position(|one| one.machine == *machine)?;
        let slot = parked.remove(place).slot;
        slot.unkeep();
        Some(slot)
    }

    /// Give the machine's parked slot up, if it has one.
    pub(super) fn release(&self, machine: &MachineId) {
        let mut parked = self.parked();
        if let Some(place) = parked.iter().position(|one| one.machine == *machine) {
            give_up(parked.remove(place));
        }
    }

    /// Give up the slot that was parked first; answers whether there was one.
    pub(super) fn release_oldest(&self) -> bool {
        let mut parked = self.parked();
        if parked.is_empty() {
            return false;
        }
        give_up(parked.remove(0));
        true
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.parked().len() as u64
    }

    fn parked(&self) -> MutexGuard<'_, Vec<Parked>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn give_up(parked: Parked) {
    tracing::debug!(machine_id = %parked.machine, slot = parked.slot.number(), "parked slot given up");
    parked.lost.cancel();
    parked.slot.release();
}
