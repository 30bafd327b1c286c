//! Retentions of machines under a clock that stands still until it is moved.

use super::super::clock::Clock;
use super::super::retention;
use super::super::simulated::Point;
use super::*;
use torpor_api::ErrorCode;

const DAY: Duration = Duration::from_secs(86_400);
const DAY_MS: u64 = 86_400_000;

async fn kept_for_a_day() -> (World, MachineId) {
    let world = World::new();
    tokio::spawn(retention::run(world.fleet.clone()));
    let id = world
        .create_from(serde_json::json!({ "name": "kept", "retention_seconds": 86_400 }))
        .await
        .unwrap();
    (world, id)
}

/// Move the clock by this much once the timer sleeps until then.
async fn pass(world: &World, by: Duration) {
    let until = world.clock.now_unix_ms() + u64::try_from(by.as_millis()).unwrap();
    world.clock.sleeper_at(until).await;
    world.clock.advance(by);
}

async fn is_gone(world: &World, id: &MachineId) {
    let gone = async {
        while world.fleet.view(id).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap();
}

#[tokio::test]
async fn a_machine_that_was_not_used_for_so_long_is_deleted_and_an_event_says_why() {
    let (world, id) = kept_for_a_day().await;
    world.clock.advance(DAY * 30);
    assert_eq!(
        world.status(&id).await,
        MachineStatus::Running,
        "it counts asleep only"
    );
    assert_eq!(world.view(&id).await.retention.unwrap().expires_unix_ms, None);
    world.pause(&id).await.unwrap();
    let asleep_since = world.clock.now_unix_ms();
    let retention = world.view(&id).await.retention.unwrap();
    assert_eq!(
        (retention.seconds, retention.remaining_ms),
        (86_400, Some(DAY_MS))
    );
    pass(&world, DAY).await;
    is_gone(&world, &id).await;
    assert!(world.host.machines_with_files().is_empty());
    assert_eq!(world.host.n_restores(), 0, "nothing is woken to be deleted");
    let events = world
        .fleet
        .store()
        .events(EventFilter {
            machine: Some(id),
            after: 0,
            limit: 100,
        })
        .await
        .unwrap();
    let last = events.last().unwrap();
    assert_eq!(
        (last.kind.as_str(), last.actor.as_str()),
        ("machine.deleted", "retention")
    );
    assert_eq!(last.detail["retention_seconds"], 86_400);
    assert_eq!(last.detail["last_used_unix_ms"], asleep_since);
}

#[tokio::test]
async fn every_use_begins_the_retention_anew_and_it_survives_resumes_and_restarts() {
    let (mut world, id) = kept_for_a_day().await;
    for _ in 0..3 {
        world.pause(&id).await.unwrap();
        world.clock.advance(DAY / 2);
        world.touch(&id).await.unwrap();
        assert_eq!(world.view(&id).await.retention.unwrap().remaining_ms, None);
    }
    world.pause(&id).await.unwrap();
    world.restart().await;
    tokio::spawn(retention::run(world.fleet.clone()));
    assert_eq!(
        world.view(&id).await.retention.unwrap().remaining_ms,
        Some(DAY_MS)
    );
    pass(&world, DAY).await;
    is_gone(&world, &id).await;
}

#[tokio::test]
async fn a_retention_can_be_changed_and_taken_away_at_any_time() {
    let (world, id) = kept_for_a_day().await;
    world.fleet.set_retention(&id, Some(60)).await.unwrap();
    world.pause(&id).await.unwrap();
    assert_eq!(
        world.view(&id).await.retention.unwrap().remaining_ms,
        Some(60_000)
    );
    world.fleet.set_retention(&id, None).await.unwrap();
    assert_eq!(world.view(&id).await.retention, None);
    world.clock.advance(DAY * 400);
    world.fleet.set_retention(&id, Some(60)).await.unwrap();
    assert_eq!(
        world.status(&id).await,
        MachineStatus::Paused,
        "it counts from the call that set it"
    );
    pass(&world, Duration::from_secs(60)).await;
    is_gone(&world, &id).await;
    let gone = world.fleet.set_retention(&id, None).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::MachineNotFound);
}

#[tokio::test]
async fn a_machine_that_is_being_woken_at_the_end_of_its_retention_stays() {
    let (world, id) = kept_for_a_day().await;
    world.pause(&id).await.unwrap();
    let hold = world.host.faults().hold(Point::Restore);
    let wake = tokio::spawn({
        let (fleet, id) = (world.fleet.clone(), id.clone());
        async move {
            fleet
                .wake(&id, WakeSource::Http, serde_json::Value::Null)
                .await
                .map(drop)
        }
    });
    hold.arrived().await;
    pass(&world, DAY).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    hold.release();
    wake.await.unwrap().unwrap();
    assert_eq!(world.status(&id).await, MachineStatus::Running);
}

#[tokio::test]
async fn a_machine_that_is_off_is_kept_as_long_as_one_that_sleeps() {
    let (world, id) = kept_for_a_day().await;
    world.host.live(&id)[0].end(torpor_api::vmm::ExitReason::Shutdown);
    world.reaches(&id, MachineStatus::Stopped).await;
    pass(&world, DAY).await;
    is_gone(&world, &id).await;
}
