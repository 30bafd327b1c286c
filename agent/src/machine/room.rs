//! Making room: while a machine waits for memory, the one that was used longest ago is put to sleep.
//!
//! One task, and only if the configuration asks for it. A machine counts as idle if nobody is inside, no command runs
//! in it, code inside does not hold it, its least time awake is over, nobody used it for [`Settings::idle_before_pause`], and some wake switch would
//! bring it back. A request that arrives meanwhile wins over the pause, as always.
//!
//! [`Settings::idle_before_pause`]: super::fleet::Settings::idle_before_pause

use super::driver::PauseOrder;
use super::fleet::Fleet;
use super::state::State;
use std::time::Duration;
use torpor_api::MachineId;
use torpor_api::activity::ActivityPolicy;
use torpor_api::http::WakePolicy;

/// Nobody tells when a machine falls idle, so they are looked at so often, while somebody waits for memory.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Make room for as long as the process lives.
pub async fn run(fleet: Fleet) {
    let halted = fleet.shared.halted.clone();
    halted.run_until_cancelled(make_room(fleet)).await;
}

async fn make_room(fleet: Fleet) {
    let Some(idle_for) = fleet.shared.settings.idle_before_pause else {
        return;
    };
    let memory = &fleet.shared.memory;
    loop {
        if memory.shortfall_mib() == 0 {
            memory.changed().await;
            continue;
        }
        if !pause_one(&fleet, idle_for).await {
            let _ = tokio::time::timeout(LOOK_AGAIN, memory.changed()).await;
        }
    }
}

/// Put the machine to sleep that was used longest ago; whether one was.
async fn pause_one(fleet: &Fleet, idle_for: Duration) -> bool {
    for id in idle(fleet, idle_for) {
        if !may_sleep(fleet, &id).await {
            continue;
        }
        match fleet.pause(&id, PauseOrder::by("room")).await {
            Ok(()) => return true,
            Err(error) => tracing::debug!(machine_id = %id, %error, "not put to sleep to make room"),
        }
    }
    false
}

/// Machines that nobody uses, the one that was used longest ago first.
fn idle(fleet: &Fleet, idle_for: Duration) -> Vec<MachineId> {
    let idle_ms = u64::try_from(idle_for.as_millis()).unwrap_or(u64::MAX);
    let used_before = fleet.now_unix_ms().saturating_sub(idle_ms);
    let mut idle: Vec<(u64, MachineId)> = fleet
        .shared
        .registry
        .all()
        .into_iter()
        .filter(|(_, handle)| handle.live.borrow().state == Some(State::Running))
        .filter(|(_, handle)| handle.gate.is_idle())
        .map(|(id, handle)| (handle.gate.last_used_unix_ms(&ActivityPolicy::default()), id))
        .filter(|(used_unix_ms, _)| *used_unix_ms <= used_before)
        .collect();
    idle.sort_unstable();
    idle.into_iter().map(|(_, id)| id).collect()
}

/// A machine that nothing would wake, or that code inside holds, stays.
async fn may_sleep(fleet: &Fleet, id: &MachineId) -> bool {
    let Ok(Some(row)) = fleet.shared.store.machine(id).await else {
        return false;
    };
    let is_young = super::usage::awake_until(fleet, id, &row.activity) > fleet.now_unix_ms();
    row.wake != WakePolicy::OFF && !is_young && fleet.hold_of(id).await.is_none()
}
