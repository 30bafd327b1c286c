//! A host with too little memory for all of its machines at a time. One machine has 256 MiB.

use super::super::fleet::ForkOrder;
use super::super::room;
use super::super::simulated::Point;
use super::*;
use torpor_api::ErrorCode;
use torpor_api::http::{ForkMachine, WakePolicy};

const IDLE: Duration = Duration::from_secs(60);

fn full_after(n_machines: u32, wake_timeout: Duration) -> World {
    World::with(Settings {
        max_running_mem_mib: n_machines * 256 + 100,
        wake_timeout,
        ..Settings::default()
    })
}

/// A host for one machine, on which an idle one gives way.
fn making_room() -> World {
    let world = World::with(Settings {
        max_running_mem_mib: 300,
        idle_before_pause: Some(IDLE),
        ..Settings::default()
    });
    tokio::spawn(room::run(world.fleet.clone()));
    world
}

fn wake(world: &World, id: &MachineId) -> tokio::task::JoinHandle<Result<(), MachineError>> {
    let (fleet, id) = (world.fleet.clone(), id.clone());
    tokio::spawn(async move {
        fleet
            .wake(&id, WakeSource::Http, serde_json::Value::Null)
            .await
            .map(drop)
    })
}

async fn waits(world: &World, id: &MachineId) {
    while !world.fleet.shared.memory.is_waiting(id) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn wakes_wait_their_turn_and_run_when_memory_comes_back() {
    let world = full_after(1, Duration::from_secs(30));
    let mut asleep = Vec::new();
    for _ in 0..3 {
        let id = world.create().await;
        world.pause(&id).await.unwrap();
        asleep.push(id);
    }
    let runs = world.create().await;
    let mut wakes = Vec::new();
    for id in &asleep {
        wakes.push(wake(&world, id));
        waits(&world, id).await;
        assert_eq!(world.status(id).await, MachineStatus::Waking);
    }
    assert_eq!(world.host.n_restores(), 0);
    let mut awake = runs;
    for (id, wake) in asleep.iter().zip(wakes) {
        world.pause(&awake).await.unwrap();
        wake.await.unwrap().unwrap();
        assert_eq!(
            world.status(id).await,
            MachineStatus::Running,
            "first come, first served"
        );
        awake = id.clone();
    }
    assert_eq!(world.host.n_restores(), 3);
}

#[tokio::test]
async fn a_host_that_stays_full_refuses_with_the_code_for_it_and_the_machine_sleeps_on() {
    let world = full_after(1, Duration::from_millis(50));
    let asleep = world.create().await;
    world.pause(&asleep).await.unwrap();
    let runs = world.create().await;
    assert_eq!(
        world.touch(&asleep).await.unwrap_err().code,
        ErrorCode::CapacityExceeded
    );
    assert_eq!(
        world.resume(&asleep).await.unwrap_err().code,
        ErrorCode::CapacityExceeded
    );
    let refused = world.create_from(serde_json::json!({})).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::CapacityExceeded);
    let never = world
        .create_from(serde_json::json!({ "mem_mib": 4096 }))
        .await
        .unwrap_err();
    assert!(never.message.contains("4096 MiB are more than"), "{never}");
    world.reaches(&asleep, MachineStatus::Paused).await;
    world.pause(&runs).await.unwrap();
    world.touch(&asleep).await.unwrap();
    assert_eq!(
        world.host.machines_with_files().len(),
        2,
        "nothing is left of what was refused"
    );
}

#[tokio::test]
async fn a_create_waits_for_its_turn() {
    let world = Arc::new(full_after(1, Duration::from_secs(30)));
    let first = world.create().await;
    let second = tokio::spawn({
        let world = Arc::clone(&world);
        async move { world.create_from(serde_json::json!({})).await }
    });
    while world.fleet.shared.memory.shortfall_mib() == 0 {
        tokio::task::yield_now().await;
    }
    world.delete(&first).await.unwrap();
    let second = second.await.unwrap().unwrap();
    assert_eq!(world.status(&second).await, MachineStatus::Running);
}

#[tokio::test]
async fn forks_get_memory_together_or_not_at_all() {
    let world = full_after(2, Duration::from_millis(50));
    let source = world.create().await;
    let order = |count| ForkOrder {
        body: ForkMachine {
            count,
            ..ForkMachine::default()
        },
        idempotency: None,
    };
    let refused = world.fleet.fork(&source, order(2)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::CapacityExceeded);
    assert_eq!(world.host.machines_with_files(), std::slice::from_ref(&source));
    assert!(
        world
            .events(&source)
            .await
            .iter()
            .all(|kind| kind != "snapshot.created"),
        "refused before it cost anything"
    );
    let forked = world.fleet.fork(&source, order(1)).await.unwrap();
    assert_eq!(forked.machines.len(), 1);
    world.delete(&forked.machines[0].id).await.unwrap();
    world.pause(&source).await.unwrap();
    assert_eq!(
        world.fleet.fork(&source, order(2)).await.unwrap().machines.len(),
        2
    );
}

#[tokio::test]
async fn machines_that_were_found_running_count_even_if_there_are_too_many() {
    let mut world = full_after(2, Duration::from_millis(50));
    let (first, second) = (world.create().await, world.create().await);
    world.settings.max_running_mem_mib = 300;
    world.restart().await;
    assert_eq!(world.status(&first).await, MachineStatus::Running);
    world.pause(&first).await.unwrap();
    assert_eq!(
        world.touch(&first).await.unwrap_err().code,
        ErrorCode::CapacityExceeded
    );
    world.pause(&second).await.unwrap();
    world.touch(&first).await.unwrap();
}

#[tokio::test]
async fn the_machine_that_was_used_longest_ago_makes_room() {
    let world = World::with(Settings {
        max_running_mem_mib: 600,
        idle_before_pause: Some(IDLE),
        ..Settings::default()
    });
    tokio::spawn(room::run(world.fleet.clone()));
    let old = world.create().await;
    world.clock.advance(IDLE);
    let newer = world.create().await;
    world.clock.advance(IDLE);
    let newest = world.create().await;
    assert_eq!(world.status(&old).await, MachineStatus::Paused);
    assert_eq!(world.status(&newer).await, MachineStatus::Running);
    assert_eq!(world.status(&newest).await, MachineStatus::Running);
    world.touch(&old).await.unwrap();
    assert_eq!(
        world.status(&newer).await,
        MachineStatus::Paused,
        "it was used before the newest"
    );
    assert_eq!(world.status(&newest).await, MachineStatus::Running);
}

#[tokio::test]
async fn a_machine_in_use_does_not_make_room() {
    let world = making_room();
    let busy = world.create().await;
    world.clock.advance(IDLE * 2);
    let pass = world.fleet.enter(&busy).unwrap();
    world.clock.advance(IDLE * 2);
    let refused = tokio::time::timeout(
        Duration::from_millis(600),
        world.create_from(serde_json::json!({})),
    )
    .await;
    assert!(refused.is_err(), "it waits");
    assert_eq!(world.count(&busy, "machine.paused").await, 0);
    drop(pass);
    world.create().await;
    assert_eq!(world.status(&busy).await, MachineStatus::Paused);
}

#[tokio::test]
async fn a_machine_that_nothing_would_wake_or_that_was_used_just_now_does_not_make_room() {
    let world = making_room();
    let dormant = world
        .create_from(serde_json::json!({ "wake": WakePolicy::OFF }))
        .await
        .unwrap();
    world.clock.advance(IDLE * 2);
    let refused = tokio::time::timeout(
        Duration::from_millis(600),
        world.create_from(serde_json::json!({})),
    )
    .await;
    assert!(refused.is_err());
    world.pause(&dormant).await.unwrap();
    let fresh = world.create().await;
    let refused = tokio::time::timeout(
        Duration::from_millis(600),
        world.create_from(serde_json::json!({})),
    )
    .await;
    assert!(refused.is_err());
    assert_eq!(world.count(&fresh, "machine.paused").await, 0);
}

#[tokio::test]
async fn a_request_to_the_machine_that_was_to_make_room_wins() {
    let world = making_room();
    let id = world.create().await;
    world.clock.advance(IDLE);
    let hold = world.host.faults().hold(Point::Persist);
    let other = tokio::spawn({
        let fleet = world.fleet.clone();
        let order = CreateOrder {
            body: serde_json::from_value(serde_json::json!({})).unwrap(),
            idempotency: None,
        };
        async move { fleet.create(order).await }
    });
    hold.arrived().await;
    world.touch(&id).await.unwrap();
    hold.release();
    world.reaches(&id, MachineStatus::Running).await;
    assert!(!other.is_finished());
    other.abort();
}

#[tokio::test]
async fn a_guest_that_reboots_keeps_its_memory() {
    let world = full_after(1, Duration::from_secs(30));
    let asleep = world.create().await;
    world.pause(&asleep).await.unwrap();
    let id = world.create().await;
    let next = wake(&world, &asleep);
    waits(&world, &asleep).await;
    let n_boots = world.host.n_boots();
    world.host.live(&id)[0].end(torpor_api::vmm::ExitReason::Reboot);
    while world.host.n_boots() == n_boots {
        tokio::task::yield_now().await;
    }
    world.reaches(&id, MachineStatus::Running).await;
    assert!(!next.is_finished());
    next.abort();
}

#[tokio::test]
async fn a_machine_that_was_found_running_makes_room_too() {
    let mut world = World::with(Settings {
        max_running_mem_mib: 600,
        idle_before_pause: Some(IDLE),
        ..Settings::default()
    });
    let asleep = world.create().await;
    world.pause(&asleep).await.unwrap();
    let found = world.create().await;
    world.settings.max_running_mem_mib = 300;
    world.restart().await;
    tokio::spawn(room::run(world.fleet.clone()));
    world.clock.advance(IDLE);
    world.touch(&asleep).await.unwrap();
    assert_eq!(world.status(&found).await, MachineStatus::Paused);
}
