//! Memory that is written ahead of a pause, if the host is configured so.
//!
//! The end of a lease is known before it comes. So much before it, what the machine has changed is written to its image
//! while it runs on, once per deadline; the pause then writes what has changed since, and is durable sooner. A machine that
//! was used, so that its sliding lease will be moved, is left alone.

use super::driver::Command;
use super::fleet::Fleet;
use super::leases;
use super::usage::millis;
use std::collections::HashMap;
use std::time::Duration;
use torpor_api::MachineId;

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_secs(1);
const LOOKED_AT_ONCE: u32 = 64;

/// Copy ahead for as long as the process lives, if it is wanted at all.
pub async fn run(fleet: Fleet) {
    let Some(before) = fleet.shared.settings.pre_copy_before else {
        return;
    };
    let halted = fleet.shared.halted.clone();
    halted.run_until_cancelled(look_ahead(fleet, before)).await;
}

async fn look_ahead(fleet: Fleet, before: Duration) {
    let mut copied: HashMap<MachineId, u64> = HashMap::new();
    loop {
        let next = fleet.now_unix_ms().saturating_add(millis(TICK));
        fleet.shared.clock.sleep_until_unix_ms(next).await;
        let by_unix_ms = fleet.now_unix_ms().saturating_add(millis(before));
        let due = match fleet.shared.store.pauses_due_by(by_unix_ms, LOOKED_AT_ONCE).await {
            Ok(due) => due,
            Err(error) => {
                tracing::warn!(%error, "deadlines cannot be read");
                continue;
            }
        };
        copied.retain(|id, _| due.iter().any(|lease| lease.machine == *id));
        for lease in due {
            if copied.get(&lease.machine) == Some(&lease.deadline_unix_ms) {
                continue;
            }
            let moved_to_unix_ms = leases::moved_to(&fleet, &lease).await;
            if moved_to_unix_ms.is_some_and(|until| until > by_unix_ms) {
                continue;
            }
            if let Some(handle) = fleet.shared.registry.find(&lease.machine) {
                copied.insert(lease.machine, lease.deadline_unix_ms);
                // A driver that is so busy does not need it now.
                let _ = handle.commands.try_send(Command::PreCopy);
            }
        }
    }
}
