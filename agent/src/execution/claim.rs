//! At most one VMM per machine: two that write one disk would destroy it.
//!
//! A start waits until the machine's earlier VMM, which a dropped or failed start may have left in its last
//! moments, has closed all that it had open. The claim lives in the execution until its process has ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;
use torpor_api::MachineId;

/// The right to open a machine's files for a VMM.
pub(super) type Claim = OwnedMutexGuard<()>;

/// All claims of this host.
#[derive(Default)]
pub(super) struct Claims(Mutex<HashMap<MachineId, Weak<tokio::sync::Mutex<()>>>>);

impl Claims {
    /// Wait until no VMM has the machine's files.
    pub(super) async fn take(&self, machine: &MachineId) -> Claim {
        self.entry(machine).lock_owned().await
    }

    /// The claim, unless a VMM has the machine's files.
    pub(super) fn try_take(&self, machine: &MachineId) -> Option<Claim> {
        self.entry(machine).try_lock_owned().ok()
    }

    fn entry(&self, machine: &MachineId) -> Arc<tokio::sync::Mutex<()>> {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(claim) = claims.get(machine).and_then(Weak::upgrade) {
            return claim;
        }
        claims.retain(|_, claim| claim.strong_count() > 0);
        let claim = Arc::default();
        claims.insert(machine.clone(), Arc::downgrade(&claim));
        claim
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_second_claim_waits_for_the_first_and_other_machines_do_not() {
        let (claims, machine) = (Claims::default(), MachineId::generate());
        let first = claims.take(&machine).await;
        let other = claims.take(&MachineId::generate()).await;
        let second = tokio::time::timeout(Duration::from_millis(20), claims.take(&machine)).await;
        assert!(second.is_err() && claims.try_take(&machine).is_none());
        drop((first, other));
        let _second = claims.take(&machine).await;
        claims.take(&MachineId::generate()).await;
        assert_eq!(
            claims.0.lock().unwrap().len(),
            2,
            "claims that nobody has are forgotten"
        );
    }
}
