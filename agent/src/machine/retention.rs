//! The retention timer: one task that deletes what nobody used for as long as it was to be kept, snapshots and machines
//! that are not awake.
//!
//! A retention that was moved in the last moment counts: the deletion looks once more, in its own transaction. One
//! that fails is taken up by the next start.

use super::driver::PauseOrder;
use super::fleet::Fleet;
use crate::store::StoreError;
use std::time::Duration;

/// After something that was due could not be deleted.
const REST: Duration = Duration::from_secs(30);
const AT_ONCE: u32 = 64;

/// Carry out retentions for as long as the process lives.
pub async fn run(fleet: Fleet) {
    let halted = fleet.shared.halted.clone();
    halted.run_until_cancelled(keep_time(fleet)).await;
}

async fn keep_time(fleet: Fleet) {
    loop {
        let changed = fleet.shared.retention_changed.notified();
        let next = match next_expiry(&fleet).await {
            Ok(next) => next,
            Err(error) => {
                tracing::error!(%error, "retentions cannot be read");
                Some(rested(&fleet))
            }
        };
        let Some(at_unix_ms) = next else {
            changed.await;
            continue;
        };
        let due = tokio::select! {
            () = fleet.shared.clock.sleep_until_unix_ms(at_unix_ms) => true,
            () = changed => false,
        };
        if due {
            let now = fleet.now_unix_ms();
            let snapshots = expire_snapshots(&fleet, now).await;
            let machines = expire_machines(&fleet, now).await;
            if !(snapshots && machines) {
                fleet.shared.clock.sleep_until_unix_ms(rested(&fleet)).await;
            }
        }
    }
}

async fn next_expiry(fleet: &Fleet) -> Result<Option<u64>, StoreError> {
    let snapshot = fleet.shared.store.next_snapshot_expiry().await?;
    let machine = fleet.shared.store.next_machine_expiry().await?;
    Ok(snapshot.into_iter().chain(machine).min())
}

fn rested(fleet: &Fleet) -> u64 {
    let rest = u64::try_from(REST.as_millis()).unwrap_or(u64::MAX);
    fleet.now_unix_ms().saturating_add(rest)
}

/// Whether every snapshot that was due is gone.
async fn expire_snapshots(fleet: &Fleet, now: u64) -> bool {
    let expired = match fleet.shared.store.expired_snapshots(now).await {
        Ok(expired) => expired,
        Err(error) => {
            tracing::error!(%error, "retentions cannot be read");
            return false;
        }
    };
    let mut all_gone = true;
    for row in expired {
        if let Err(error) = fleet.end_snapshot(&row.id, "retention", Some(now)).await {
            tracing::warn!(snapshot_id = %row.id, %error, "snapshot not deleted");
            all_gone = false;
        }
    }
    all_gone
}

/// Likewise for machines. One that is being woken in this moment stays.
async fn expire_machines(fleet: &Fleet, now: u64) -> bool {
    let expired = match fleet.shared.store.expired_machines(now, AT_ONCE).await {
        Ok(expired) => expired,
        Err(error) => {
            tracing::error!(%error, "retentions cannot be read");
            return false;
        }
    };
    let mut all_gone = true;
    for id in expired {
        let order = PauseOrder {
            only_if_expired_at_unix_ms: Some(now),
            ..PauseOrder::by("retention")
        };
        if let Err(error) = fleet.delete(&id, order).await {
            tracing::warn!(machine_id = %id, %error, "machine not deleted at the end of its retention");
            all_gone = false;
        }
    }
    all_gone
}
