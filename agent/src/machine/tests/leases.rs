//! Leases under a clock that stands still until it is moved.

use super::super::clock::Clock;
use super::super::fleet::PolicyRule;
use super::super::leases::{self, RETRY};
use super::super::pre_copy;
use super::super::simulated::{Fault, Point};
use super::*;
use torpor_api::ErrorCode;

const MINUTE: Duration = Duration::from_secs(60);

async fn leased(world: &World, lease: serde_json::Value) -> MachineId {
    tokio::spawn(leases::run(world.fleet.clone()));
    world
        .create_from(serde_json::json!({ "lease": lease }))
        .await
        .unwrap()
}

/// Move the clock by this much once the timer sleeps until then.
async fn pass(world: &World, by: Duration) {
    let until = world.clock.now_unix_ms() + u64::try_from(by.as_millis()).unwrap();
    world.clock.sleeper_at(until).await;
    world.clock.advance(by);
}

#[tokio::test]
async fn a_lease_pauses_and_a_wake_starts_the_window_anew() {
    let world = World::new();
    let id = leased(&world, serde_json::json!({ "seconds": 60, "action": "pause" })).await;
    assert_eq!(world.view(&id).await.lease.unwrap().remaining_ms, Some(60_000));
    pass(&world, MINUTE).await;
    world.reaches(&id, MachineStatus::Paused).await;
    assert_eq!(
        world.view(&id).await.lease.unwrap().deadline_unix_ms,
        None,
        "time asleep does not count"
    );
    world.clock.advance(MINUTE * 600);
    world.resume(&id).await.unwrap();
    assert_eq!(world.view(&id).await.lease.unwrap().remaining_ms, Some(60_000));
    pass(&world, MINUTE).await;
    world.reaches(&id, MachineStatus::Paused).await;
}

#[tokio::test]
async fn a_destroy_lease_leaves_nothing() {
    let world = World::new();
    let id = leased(&world, serde_json::json!({ "seconds": 60, "action": "destroy" })).await;
    assert_eq!(world.view(&id).await.wake, torpor_api::http::WakePolicy::OFF);
    pass(&world, MINUTE).await;
    while world.fleet.view(&id).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(world.host.machines_with_files().is_empty());
}

#[tokio::test]
async fn a_lease_that_is_moved_before_the_pause_commits_is_not_carried_out() {
    let world = World::new();
    let id = leased(&world, serde_json::json!({ "seconds": 60, "action": "pause" })).await;
    let hold = world.host.faults().hold(Point::Persist);
    pass(&world, MINUTE).await;
    hold.arrived().await;
    let longer = serde_json::from_value(serde_json::json!({ "seconds": 600, "action": "pause" })).unwrap();
    world
        .fleet
        .set_lease(&id, Some(longer), PolicyRule::DestroyOrWake)
        .await
        .unwrap();
    hold.release();
    world.reaches(&id, MachineStatus::Running).await;
    assert_eq!(world.view(&id).await.lease.unwrap().remaining_ms, Some(600_000));
}

#[tokio::test]
async fn a_lease_pause_that_fails_is_tried_again_after_a_while() {
    let world = World::new();
    let id = leased(&world, serde_json::json!({ "seconds": 60, "action": "pause" })).await;
    world
        .host
        .faults()
        .at(Point::Persist, Fault::Fail(ErrorCode::DiskFull));
    pass(&world, MINUTE).await;
    while world.view(&id).await.last_error.is_none() {
        tokio::task::yield_now().await;
    }
    world.reaches(&id, MachineStatus::Running).await;
    assert_eq!(world.host.faults().n_left(), 0);
    pass(&world, RETRY).await;
    world.reaches(&id, MachineStatus::Paused).await;
}

#[tokio::test]
async fn a_sliding_lease_follows_use_and_an_absolute_one_does_not() {
    for (mode, expected) in [
        ("sliding", MachineStatus::Running),
        ("absolute", MachineStatus::Paused),
    ] {
        let world = World::new();
        let lease = serde_json::json!({ "seconds": 60, "action": "pause", "mode": mode });
        let id = leased(&world, lease).await;
        let deadline = START_UNIX_MS + 60_000;
        world.clock.sleeper_at(deadline).await;
        world.clock.advance(MINUTE / 2);
        world.touch(&id).await.unwrap();
        world.clock.advance(MINUTE / 2);
        if expected == MachineStatus::Running {
            world.clock.sleeper_at(deadline + 30_000).await;
            assert_eq!(world.status(&id).await, MachineStatus::Running);
            world.clock.advance(MINUTE / 2);
        }
        world.reaches(&id, MachineStatus::Paused).await;
    }
}

#[tokio::test]
async fn a_year_of_leases_neither_drifts_nor_stops() {
    let world = World::new();
    let day = MINUTE * 60 * 24;
    let id = leased(
        &world,
        serde_json::json!({ "seconds": 86_400, "action": "pause" }),
    )
    .await;
    for n_days in 1..=365 {
        pass(&world, day).await;
        world.reaches(&id, MachineStatus::Paused).await;
        assert_eq!(world.clock.now_unix_ms(), START_UNIX_MS + n_days * 86_400_000);
        world.resume(&id).await.unwrap();
    }
    assert_eq!(world.view(&id).await.pauses, 365);
}

#[tokio::test]
async fn memory_is_copied_once_shortly_before_the_lease_pauses_and_not_if_the_lease_will_be_moved() {
    let world = World::with(Settings {
        pre_copy_before: Some(Duration::from_secs(5)),
        ..Settings::default()
    });
    tokio::spawn(pre_copy::run(world.fleet.clone()));
    let pausing = leased(&world, serde_json::json!({ "seconds": 60, "action": "pause" })).await;
    let sliding = serde_json::json!({ "seconds": 60, "action": "pause", "mode": "sliding" });
    let used = world
        .create_from(serde_json::json!({ "lease": sliding }))
        .await
        .unwrap();
    let n_pre_copies = |id: &MachineId| world.host.live(id)[0].n_pre_copies();
    for second in 1..=58 {
        pass(&world, Duration::from_secs(1)).await;
        if second == 30 {
            world.touch(&used).await.unwrap();
        }
        if second <= 54 {
            assert_eq!(n_pre_copies(&pausing), 0, "after {second} s");
        }
    }
    while n_pre_copies(&pausing) == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!((n_pre_copies(&pausing), n_pre_copies(&used)), (1, 0));
    world.clock.advance(MINUTE);
    world.reaches(&pausing, MachineStatus::Paused).await;
}
