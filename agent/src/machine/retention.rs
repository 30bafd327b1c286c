//! The retention timer: one task that deletes snapshots which nobody used for as long as they were to be kept.
//!
//! A retention that was moved in the last moment counts: the deletion looks once more, in its own transaction. One
//! that fails is taken up by the next start.

use super::fleet::Fleet;
use std::time::Duration;

/// After a failure of the store.
const REST: Duration = Duration::from_secs(30);

/// Carry out retentions for as long as the process lives.
pub async fn run(fleet: Fleet) {
    let halted = fleet.shared.halted.clone();
    halted.run_until_cancelled(keep_time(fleet)).await;
}

async fn keep_time(fleet: Fleet) {
    loop {
        let changed = fleet.shared.retention_changed.notified();
        let next = match fleet.shared.store.next_snapshot_expiry().await {
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
        tokio::select! {
            () = fleet.shared.clock.sleep_until_unix_ms(at_unix_ms) => expire(&fleet).await,
            () = changed => {}
        }
    }
}

fn rested(fleet: &Fleet) -> u64 {
    let rest = u64::try_from(REST.as_millis()).unwrap_or(u64::MAX);
    fleet.now_unix_ms().saturating_add(rest)
}

async fn expire(fleet: &Fleet) {
    let now = fleet.now_unix_ms();
    let expired = match fleet.shared.store.expired_snapshots(now).await {
        Ok(expired) => expired,
        Err(error) => {
            tracing::error!(%error, "retentions cannot be read");
            fleet.shared.clock.sleep_until_unix_ms(rested(fleet)).await;
            return;
        }
    };
    let mut failed = false;
    for row in expired {
        if let Err(error) = fleet.end_snapshot(&row.id, "retention", Some(now)).await {
            tracing::warn!(snapshot_id = %row.id, %error, "snapshot not deleted");
            failed = true;
        }
    }
    if failed {
        fleet.shared.clock.sleep_until_unix_ms(rested(fleet)).await;
    }
}
