//! The meter: which running machines are in use by what nobody tells of, and since when.
//!
//! Requests and sessions report themselves at the gate when they begin. Requests that still wait for their answer, payload
//! on open connections, traffic of the guest's own and busy processors are only seen by looking, so one task looks at
//! every running machine every [`LOOK_EVERY`], or three times in a sliding lease's window if that is shorter; and the
//! lease timer once more before a lease ends. What passed since the last look counts as if it were now, so a lease ends
//! at most a third of its window late.

use super::fleet::Fleet;
use super::registry::Handle;
use super::state::State;
use crate::store::MachineRow;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use torpor_api::activity::{ActivityPolicy, ActivitySource};
use torpor_api::{ExecutionId, LeaseMode, MachineId};

/// Longest time between two looks at a running machine.
pub const LOOK_EVERY: Duration = Duration::from_secs(15);
const TICK: Duration = Duration::from_secs(1);
/// Traffic of the guest's own below these is keep-alives: bytes between two looks, and bytes a second.
const QUIET_BYTES: u64 = 512;
const QUIET_BYTES_PER_SECOND: u64 = 32;

/// Counters of one run, from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RunUsage {
    /// Processor time of the VMM, vCPUs included.
    pub cpu_us: u64,
    /// Bytes between the guest and the world outside, both ways.
    pub outbound_bytes: u64,
}

#[derive(Debug, Clone)]
struct Seen {
    execution: ExecutionId,
    at_unix_ms: u64,
    run: RunUsage,
    proxied_bytes: u64,
}

/// What was seen last, of every running machine.
#[derive(Default)]
pub struct Meter(Mutex<HashMap<MachineId, Seen>>);

impl Meter {
    fn lock(&self) -> MutexGuard<'_, HashMap<MachineId, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Look at running machines for as long as the process lives.
pub async fn run(fleet: Fleet) {
    let halted = fleet.shared.halted.clone();
    halted.run_until_cancelled(look_around(fleet)).await;
}

async fn look_around(fleet: Fleet) {
    loop {
        let next = fleet.now_unix_ms().saturating_add(millis(TICK));
        fleet.shared.clock.sleep_until_unix_ms(next).await;
        let running: HashMap<MachineId, Handle> = fleet
            .shared
            .registry
            .all()
            .into_iter()
            .filter(|(_, handle)| handle.live.borrow().state == Some(State::Running))
            .collect();
        fleet.shared.meter.lock().retain(|id, _| running.contains_key(id));
        for (id, handle) in running {
            // Its row is read only when a look may be due.
            if is_fresh(&fleet, &id, TICK) {
                continue;
            }
            let Ok(Some(row)) = fleet.shared.store.machine(&id).await else {
                continue;
            };
            if !is_fresh(&fleet, &id, interval(&row)) {
                look(&fleet, &id, &handle, &row.activity).await;
            }
        }
    }
}

fn is_fresh(fleet: &Fleet, id: &MachineId, interval: Duration) -> bool {
    let seen = fleet.shared.meter.lock().get(id).map(|seen| seen.at_unix_ms);
    seen.is_some_and(|at| at.saturating_add(millis(interval)) > fleet.now_unix_ms())
}

fn interval(row: &MachineRow) -> Duration {
    let window = row.lease.filter(|lease| lease.mode == LeaseMode::Sliding);
    let third = window.map_or(LOOK_EVERY, |lease| Duration::from_secs(lease.seconds) / 3);
    third.clamp(TICK, LOOK_EVERY)
}

/// Compare the machine's counters with the last look's, and tell its gate what was used meanwhile.
pub(super) async fn look(fleet: &Fleet, id: &MachineId, handle: &Handle, policy: &ActivityPolicy) {
    let gate = &handle.gate;
    let Some(epoch) = gate.current() else { return };
    let activity = gate.activity();
    let seen = Seen {
        execution: epoch.execution.id().clone(),
        run: epoch.execution.usage().await,
        at_unix_ms: fleet.now_unix_ms(),
        proxied_bytes: activity
            .to_guest_bytes()
            .saturating_add(activity.from_guest_bytes()),
    };
    let before = fleet.shared.meter.lock().insert(id.clone(), seen.clone());
    let now = seen.at_unix_ms;
    // The gate counts bytes for as long as the machine has a driver, over its executions.
    let moved = seen.proxied_bytes != before.as_ref().map_or(0, |before| before.proxied_bytes);
    if moved || activity.n_unanswered() > 0 {
        gate.touch(ActivitySource::Proxy, now);
    }
    if gate.is_at_work() {
        gate.touch(ActivitySource::Sessions, now);
    }
    let Some(before) = before.filter(|before| before.execution == seen.execution) else {
        return;
    };
    let elapsed_ms = now.saturating_sub(before.at_unix_ms);
    let outbound = seen.run.outbound_bytes.saturating_sub(before.run.outbound_bytes);
    if outbound > QUIET_BYTES.max(elapsed_ms.saturating_mul(QUIET_BYTES_PER_SECOND) / 1000) {
        gate.touch(ActivitySource::Outbound, now);
    }
    // Both in microseconds; the floor is in percent of one processor.
    let busy = seen.run.cpu_us.saturating_sub(before.run.cpu_us);
    let floor = elapsed_ms
        .saturating_mul(10)
        .saturating_mul(policy.cpu_floor_percent.into());
    if elapsed_ms > 0 && busy >= floor {
        gate.touch(ActivitySource::Cpu, now);
    }
}

/// When the machine's least time awake is over, in Unix time in milliseconds; 0 if it is not awake.
pub(super) fn awake_until(fleet: &Fleet, id: &MachineId, policy: &ActivityPolicy) -> u64 {
    let Some(handle) = fleet.shared.registry.find(id) else {
        return 0;
    };
    let least_ms = policy.min_awake_seconds.saturating_mul(1000);
    handle.gate.awake_since_unix_ms().saturating_add(least_ms)
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
