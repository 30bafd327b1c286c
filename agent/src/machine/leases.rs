//! The lease timer: one task that sleeps until the earliest deadline in the store.
//!
//! A due lease is claimed by moving its next look [`RETRY`] ahead, so a pause that fails, for want of disk space
//! say, is tried again then, and a torpord that dies in between looks again, too. Whether the deadline still stands
//! is checked once more when the pause commits. A lease whose machine was used since, or is not awake for its least time
//! yet, is moved, not carried out.

use super::driver::PauseOrder;
use super::fleet::Fleet;
use super::usage;
use crate::store::DueLease;
use std::time::Duration;
use torpor_api::{ErrorCode, LeaseAction, LeaseMode};

/// A lease that could not be carried out is looked at again after this long.
pub const RETRY: Duration = Duration::from_secs(30);
const CLAIMED_AT_ONCE: u32 = 64;

/// Carry out leases for as long as the process lives.
pub async fn run(fleet: Fleet) {
    let halted = fleet.shared.halted.clone();
    halted.run_until_cancelled(keep_time(fleet)).await;
}

async fn keep_time(fleet: Fleet) {
    loop {
        let changed = fleet.shared.leases_changed.notified();
        let next = match fleet.shared.store.next_lease_check().await {
            Ok(next) => next,
            Err(error) => {
                tracing::error!(%error, "deadlines cannot be read");
                Some(fleet.now_unix_ms().saturating_add(1000))
            }
        };
        match next {
            Some(at_unix_ms) => {
                tokio::select! {
                    () = fleet.shared.clock.sleep_until_unix_ms(at_unix_ms) => claim(&fleet).await,
                    () = changed => {}
                }
            }
            None => changed.await,
        }
    }
}

async fn claim(fleet: &Fleet) {
    let now = fleet.now_unix_ms();
    let again = now.saturating_add(u64::try_from(RETRY.as_millis()).unwrap_or(u64::MAX));
    let due = match fleet
        .shared
        .store
        .claim_due_leases(now, again, CLAIMED_AT_ONCE)
        .await
    {
        Ok(due) => due,
        Err(error) => {
            tracing::error!(%error, "due leases cannot be claimed");
            // Without this a store that refuses to write would be asked without a pause.
            fleet
                .shared
                .clock
                .sleep_until_unix_ms(now.saturating_add(1000))
                .await;
            return;
        }
    };
    for lease in due {
        if let Some(until) = moved_to(fleet, &lease).await {
            let moved = fleet
                .shared
                .store
                .slide_lease(lease.machine.clone(), lease.deadline_unix_ms, until)
                .await;
            if let Err(error) = moved {
                tracing::warn!(machine_id = %lease.machine, %error, "sliding deadline not moved");
            }
            continue;
        }
        tokio::spawn(carry_out(fleet.clone(), lease));
    }
}

/// The new deadline of a lease whose machine is awake for too short a time yet, or was used since the old one was
/// set.
pub(super) async fn moved_to(fleet: &Fleet, lease: &DueLease) -> Option<u64> {
    let handle = fleet.shared.registry.find(&lease.machine)?;
    let mut until = usage::awake_until(fleet, &lease.machine, &lease.activity);
    if lease.policy.mode == LeaseMode::Sliding {
        usage::look(fleet, &lease.machine, &handle, &lease.activity).await;
        let window = lease.policy.seconds.saturating_mul(1000);
        let used_unix_ms = handle.gate.last_used_unix_ms(&lease.activity);
        until = until.max(used_unix_ms.saturating_add(window));
    }
    (until > fleet.now_unix_ms()).then_some(until)
}

/// Put a sliding lease off for as long as code inside holds the machine; whether it was.
async fn is_held(fleet: &Fleet, lease: &DueLease) -> bool {
    if lease.policy.mode != LeaseMode::Sliding || !lease.activity.hold {
        return false;
    }
    let Some(hold) = fleet.hold_of(&lease.machine).await else {
        return false;
    };
    let window = lease.policy.seconds.saturating_mul(1000);
    // Asked again before its end: it may be released, or taken anew.
    let until = fleet
        .now_unix_ms()
        .saturating_add(hold.remaining_ms.min(window).max(1));
    let moved = fleet
        .shared
        .store
        .slide_lease(lease.machine.clone(), lease.deadline_unix_ms, until)
        .await;
    if let Err(error) = &moved {
        tracing::warn!(machine_id = %lease.machine, %error, "held lease not moved");
    }
    fleet.shared.leases_changed.notify_one();
    moved.is_ok()
}

async fn carry_out(fleet: Fleet, lease: DueLease) {
    if is_held(&fleet, &lease).await {
        return;
    }
    let order = PauseOrder {
        only_if_deadline_unix_ms: Some(lease.deadline_unix_ms),
        ..PauseOrder::by("lease")
    };
    let outcome = match lease.policy.action {
        LeaseAction::Pause => fleet.pause(&lease.machine, order).await,
        LeaseAction::Destroy => fleet.delete(&lease.machine, order).await,
    };
    match outcome {
        Ok(()) => {}
        // Overtaken by a wake, or moved, or gone: as it should be.
        Err(error)
            if matches!(
                error.code,
                ErrorCode::TransitionInProgress | ErrorCode::MachineNotFound
            ) =>
        {
            tracing::debug!(machine_id = %lease.machine, %error, "lease not carried out");
        }
        Err(error) => {
            tracing::warn!(machine_id = %lease.machine, %error, "lease not carried out, tried again in 30 s");
        }
    }
}
