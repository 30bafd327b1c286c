//! What a starting torpord does with what it finds: rows that claim something runs, VMMs that run.
//!
//! Paused and stopped machines are not looked at, however many there are.

use super::driver::{Entry, Found};
use super::error::MachineError;
use super::fleet::Fleet;
use super::hypervisor::{Adopted, ImageState};
use super::registry::Handle;
use crate::store::MachineRow;
use std::collections::HashMap;
use torpor_api::MachineId;

impl Fleet {
    /// Take up every machine that was awake or half done, and the routes of all services.
    ///
    /// # Errors
    /// The store cannot be read; nothing was changed then.
    pub async fn recover(&self) -> Result<(), MachineError> {
        self.recover_snapshots().await?;
        self.shared.store.doom_hidden().await?;
        let rows = self.shared.store.unsettled().await?;
        let routes = self.shared.store.routes().await?;
        let mut adopted: HashMap<MachineId, Vec<Adopted>> = HashMap::new();
        for found in self.shared.hypervisor.adopt().await {
            adopted.entry(found.machine.clone()).or_default().push(found);
        }
        let mut taken_up = Vec::new();
        for row in rows {
            let vmms = adopted.remove(&row.spec.id).unwrap_or_default();
            taken_up.push(self.take_up(row, vmms).await);
        }
        for (id, vmms) in adopted {
            match self.shared.store.machine(&id).await? {
                Some(row) => taken_up.push(self.take_up(row, vmms).await),
                None => {
                    tracing::warn!(machine_id = %id, "VMM of an unknown machine is ended");
                    end(vmms).await;
                }
            }
        }
        for route in routes {
            let port = route.listen_port;
            if let Err(error) = self.shared.routes.open(route) {
                tracing::error!(listen_port = port, %error, "service is not reachable");
            }
        }
        // Nobody is shown a machine as its row says while its driver knows better.
        for mut driver in taken_up {
            let _ = driver.live.wait_for(|live| live.state.is_some()).await;
        }
        Ok(())
    }

    async fn take_up(&self, row: MachineRow, mut vmms: Vec<Adopted>) -> Handle {
        // Two VMMs of one machine cannot be; should they, the committed one is it.
        let live = vmms
            .iter()
            .position(|vmm| Some(vmm.execution.id()) == row.execution.as_ref());
        let kept = match (live, vmms.is_empty()) {
            (_, true) => None,
            (Some(place), false) => Some(vmms.swap_remove(place)),
            (None, false) => Some(vmms.swap_remove(0)),
        };
        end(vmms).await;
        let image = self.shared.hypervisor.inspect_image(&row.spec.id).await;
        if let ImageState::Corrupt { message } = &image {
            tracing::warn!(machine_id = %row.spec.id, message, "hibernation image is damaged");
        }
        let id = row.spec.id.clone();
        let vmm = kept.map(|adopted| (adopted.execution, adopted.state));
        self.driver(&id, Entry::Found(Box::new(Found { row, vmm, image })))
    }
}

async fn end(vmms: Vec<Adopted>) {
    for vmm in vmms {
        vmm.execution.quit().await;
    }
}
