//! Pausing, waking, deleting, and what happens when they meet.

use super::super::driver::{Command, Entry, WakeOrder};
use super::super::simulated::Point;
use super::*;
use torpor_api::{ErrorCode, ExecutionId};

#[tokio::test]
async fn a_pause_and_a_wake_keep_memory_and_change_the_execution() {
    let world = World::new();
    let id = world.create().await;
    let first = world.view(&id).await;
    assert_eq!(first.status, MachineStatus::Running);
    assert_eq!(world.exec(&id, "count").await, Ok(1));
    world.pause(&id).await.unwrap();
    let asleep = world.view(&id).await;
    assert_eq!(
        (asleep.status, asleep.execution_id, asleep.pauses),
        (MachineStatus::Paused, None, 1)
    );
    assert!(
        world.host.live(&id).is_empty(),
        "a paused machine costs no process"
    );
    assert_eq!(world.exec(&id, "count").await, Ok(2));
    let second = world.view(&id).await;
    assert_ne!(first.execution_id, second.execution_id);
    assert_eq!(second.wakes, 1);
    for alias in [first.execution_id.unwrap(), second.execution_id.unwrap()] {
        assert_eq!(world.fleet.resolve(alias.as_str()).await.unwrap(), id);
    }
}

#[tokio::test]
async fn a_paused_machine_has_no_task() {
    let world = World::new();
    let id = world.create().await;
    world.pause(&id).await.unwrap();
    while world.fleet.n_drivers() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
    assert_eq!(world.fleet.n_drivers(), 0, "a read starts no task");
}

#[tokio::test]
async fn a_wake_that_comes_while_the_vmm_is_ended_is_told_of_as_its_own() {
    let world = World::new();
    let id = world.create().await;
    world.pause(&id).await.unwrap();
    let null = serde_json::Value::Null;
    drop(
        world
            .fleet
            .wake(&id, WakeSource::Ssh, null.clone())
            .await
            .unwrap(),
    );
    let hold = world.host.faults().hold(Point::Quit);
    let wake = async {
        hold.arrived().await;
        let woken = world.fleet.wake(&id, WakeSource::Http, null);
        tokio::join!(woken, async {
            // Until the driver has it.
            tokio::time::sleep(Duration::from_millis(300)).await;
            hold.release();
        })
    };
    let (paused, (woken, ())) = tokio::join!(world.pause(&id), wake);
    assert!(woken.unwrap().report.is_some(), "it was restored for this caller");
    drop(paused);
    while world.count(&id, "machine.woken").await < 2 {
        tokio::task::yield_now().await;
    }
    let events = world.recorded(&id).await;
    let woken = events.into_iter().filter(|event| event.kind == "machine.woken");
    assert_eq!(
        woken.map(|event| event.actor).collect::<Vec<_>>(),
        ["ssh", "http"]
    );
}

/// What it was told is nowhere else: a caller who is neither answered nor turned away waits for ever.
#[tokio::test]
async fn a_command_that_reaches_a_driver_while_it_leaves_comes_back() {
    let world = World::new();
    let id = world.create().await;
    world.pause(&id).await.unwrap();
    let left = async || {
        while world.fleet.n_drivers() > 0 {
            tokio::task::yield_now().await;
        }
    };
    left().await;
    let handle = world.fleet.driver(&id, Entry::Load);
    let place = handle.commands.reserve().await.unwrap();
    left().await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let (reply, answer) = tokio::sync::oneshot::channel();
    place.send(Command::Wake(WakeOrder::by("http"), reply));
    let answer = tokio::time::timeout(Duration::from_secs(10), answer).await;
    assert!(answer.expect("neither answered nor turned away").is_err());
}

#[tokio::test]
async fn a_thousand_wakes_are_one_restore() {
    let world = World::new();
    let id = world.create().await;
    world.pause(&id).await.unwrap();
    let hold = world.host.faults().hold(Point::Restore);
    let wakes: Vec<_> = (0..1000)
        .map(|_| {
            let (fleet, id) = (world.fleet.clone(), id.clone());
            tokio::spawn(async move {
                fleet
                    .wake(&id, WakeSource::Http, serde_json::Value::Null)
                    .await
                    .map(|woken| woken.pass.epoch().execution.id().clone())
            })
        })
        .collect();
    hold.arrived().await;
    hold.release();
    let mut executions = Vec::<ExecutionId>::new();
    for wake in wakes {
        executions.push(wake.await.unwrap().unwrap());
    }
    executions.dedup();
    assert_eq!((executions.len(), world.host.n_restores()), (1, 1));
    assert_eq!(world.host.live(&id).len(), 1);
}

#[tokio::test]
async fn a_wake_at_any_point_of_a_pause_wins_at_once() {
    for point in [Point::Freeze, Point::Persist, Point::Persisted] {
        let world = World::new();
        let id = world.create().await;
        world.exec(&id, "count").await.unwrap();
        let before = world.view(&id).await.execution_id;
        // Never released: the pause has to be left behind, not waited for.
        let hold = world.host.faults().hold(point);
        let pause = tokio::spawn({
            let (fleet, id) = (world.fleet.clone(), id.clone());
            async move { fleet.pause(&id, PauseOrder::by("api")).await }
        });
        hold.arrived().await;
        assert_eq!(world.status(&id).await, MachineStatus::Pausing, "{point:?}");
        world.touch(&id).await.unwrap();
        assert_eq!(
            pause.await.unwrap().unwrap_err().code,
            ErrorCode::TransitionInProgress
        );
        assert_eq!(world.exec(&id, "count").await, Ok(2), "{point:?}");
        assert_eq!(world.view(&id).await.execution_id, before);
        assert_eq!(world.host.n_restores(), 0);
        assert_eq!(world.count(&id, "machine.pause_cancelled").await, 1);
        world.pause(&id).await.unwrap();
        assert_eq!(world.exec(&id, "count").await, Ok(3), "{point:?}");
    }
}

#[tokio::test]
async fn a_wake_during_the_eviction_restores_right_after_it() {
    let world = World::new();
    let id = world.create().await;
    world.exec(&id, "count").await.unwrap();
    let hold = world.host.faults().hold(Point::Quit);
    let pause = tokio::spawn({
        let (fleet, id) = (world.fleet.clone(), id.clone());
        async move { fleet.pause(&id, PauseOrder::by("api")).await }
    });
    hold.arrived().await;
    let wake = tokio::spawn({
        let (fleet, id) = (world.fleet.clone(), id.clone());
        async move {
            fleet
                .wake(&id, WakeSource::Http, serde_json::Value::Null)
                .await
                .map(drop)
        }
    });
    tokio::task::yield_now().await;
    hold.release();
    pause.await.unwrap().unwrap();
    wake.await.unwrap().unwrap();
    assert_eq!(world.exec(&id, "count").await, Ok(2));
}

#[tokio::test]
async fn a_pause_waits_for_requests_in_flight() {
    let world = World::new();
    let id = world.create().await;
    let request = world
        .fleet
        .wake(&id, WakeSource::Http, serde_json::Value::Null)
        .await
        .unwrap();
    let pause = tokio::spawn({
        let (fleet, id) = (world.fleet.clone(), id.clone());
        async move { fleet.pause(&id, PauseOrder::by("api")).await }
    });
    world.reaches(&id, MachineStatus::Pausing).await;
    assert_eq!(
        world.host.live(&id)[0].state(),
        torpor_api::vmm::VmmState::Running
    );
    world.touch(&id).await.unwrap();
    assert_eq!(
        world.status(&id).await,
        MachineStatus::Pausing,
        "the gate is open while requests are let out"
    );
    drop(request);
    pause.await.unwrap().unwrap();
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
}

#[tokio::test]
async fn a_request_that_never_ends_cannot_hold_off_a_pause() {
    let world = World::with(Settings {
        drain_grace: Duration::from_millis(20),
        ..Settings::default()
    });
    let id = world.create().await;
    let request = world
        .fleet
        .wake(&id, WakeSource::Http, serde_json::Value::Null)
        .await
        .unwrap();
    world.pause(&id).await.unwrap();
    assert!(
        request.pass.epoch().over.is_cancelled(),
        "whoever is inside is told that it is over"
    );
}

#[tokio::test]
async fn switches_that_are_off_let_nobody_wake() {
    let world = World::new();
    let wake = serde_json::json!({ "http": false, "ssh": false, "tcp": true, "api": false });
    let id = world
        .create_from(serde_json::json!({ "wake": wake }))
        .await
        .unwrap();
    world.touch(&id).await.expect("an awake machine takes everybody");
    world.pause(&id).await.unwrap();
    assert_eq!(
        world.touch(&id).await.unwrap_err().code,
        ErrorCode::AutoResumeDisabled
    );
    assert_eq!(
        world.exec(&id, "count").await.unwrap_err().code,
        ErrorCode::AutoResumeDisabled
    );
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
    world
        .resume(&id)
        .await
        .expect("an explicit resume needs no switch");
    world.pause(&id).await.unwrap();
    world
        .fleet
        .wake(&id, WakeSource::Tcp, serde_json::Value::Null)
        .await
        .expect("the TCP switch is on");
}

#[tokio::test]
async fn a_pause_is_not_overtaken_by_who_may_not_wake() {
    for point in [Point::Freeze, Point::Persist, Point::Persisted, Point::Quit] {
        let world = World::new();
        let id = world
            .create_from(serde_json::json!({ "wake": torpor_api::http::WakePolicy::OFF }))
            .await
            .unwrap();
        let hold = world.host.faults().hold(point);
        let pause = tokio::spawn({
            let (fleet, id) = (world.fleet.clone(), id.clone());
            async move { fleet.pause(&id, PauseOrder::by("api")).await }
        });
        hold.arrived().await;
        for source in [
            WakeSource::Http,
            WakeSource::Ssh,
            WakeSource::Tcp,
            WakeSource::Api,
        ] {
            let refused = world.fleet.wake(&id, source, serde_json::Value::Null).await;
            let code = refused.map(drop).unwrap_err().code;
            assert_eq!(code, ErrorCode::AutoResumeDisabled, "{source:?} at {point:?}");
        }
        hold.release();
        pause.await.unwrap().unwrap();
        assert_eq!(world.status(&id).await, MachineStatus::Paused, "{point:?}");
        assert_eq!(world.host.n_restores(), 0);
    }
}

#[tokio::test]
async fn pause_and_resume_can_be_repeated() {
    let world = World::new();
    let id = world.create().await;
    world.resume(&id).await.unwrap();
    world.pause(&id).await.unwrap();
    world.pause(&id).await.unwrap();
    assert_eq!(world.view(&id).await.pauses, 1);
    world.resume(&id).await.unwrap();
    world.resume(&id).await.unwrap();
    assert_eq!((world.host.n_restores(), world.view(&id).await.wakes), (1, 1));
}

#[tokio::test]
async fn a_slow_wake_times_out_and_goes_on() {
    let world = World::with(Settings {
        wake_timeout: Duration::from_millis(20),
        ..Settings::default()
    });
    let id = world.create().await;
    world.pause(&id).await.unwrap();
    let hold = world.host.faults().hold(Point::Restore);
    assert_eq!(world.touch(&id).await.unwrap_err().code, ErrorCode::ResumeTimeout);
    assert_eq!(world.status(&id).await, MachineStatus::Waking);
    hold.release();
    world.reaches(&id, MachineStatus::Running).await;
    assert_eq!(world.host.n_restores(), 1);
}

#[tokio::test]
async fn deleting_ends_in_every_state() {
    for point in [
        None,
        Some(Point::Freeze),
        Some(Point::Persist),
        Some(Point::Persisted),
        Some(Point::Restore),
    ] {
        let world = World::new();
        let id = world.create().await;
        let _held = match point {
            None => None,
            Some(point) => {
                if point == Point::Restore {
                    world.pause(&id).await.unwrap();
                }
                let hold = world.host.faults().hold(point);
                let (fleet, machine) = (world.fleet.clone(), id.clone());
                tokio::spawn(async move {
                    if point == Point::Restore {
                        let _ = fleet.resume(&machine, ResumeFrom::Memory).await;
                    } else {
                        let _ = fleet.pause(&machine, PauseOrder::by("api")).await;
                    }
                });
                hold.arrived().await;
                Some(hold)
            }
        };
        let alias = world.view(&id).await.execution_id;
        world.delete(&id).await.unwrap();
        assert_eq!(
            world.fleet.view(&id).await.unwrap_err().code,
            ErrorCode::MachineNotFound,
            "{point:?}"
        );
        assert!(world.host.machines_with_files().is_empty(), "{point:?}");
        assert!(world.host.live(&id).is_empty(), "{point:?}");
        if let Some(alias) = alias {
            assert!(
                world.fleet.resolve(alias.as_str()).await.is_err(),
                "an alias ends with its machine"
            );
        }
        assert_eq!(world.count(&id, "machine.deleted").await, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn requests_at_random_instants_of_pausing_and_waking_never_fail() {
    let world = World::new();
    let id = world.create().await;
    let requests: Vec<_> = (0..8)
        .map(|_| {
            let (fleet, id) = (world.fleet.clone(), id.clone());
            tokio::spawn(async move {
                for _ in 0..250 {
                    let request = ExecRequest {
                        argv: vec!["count".to_owned()],
                        ..ExecRequest::default()
                    };
                    fleet.exec(&id, request).await.unwrap();
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    let pauses = tokio::spawn({
        let (fleet, id) = (world.fleet.clone(), id.clone());
        async move {
            loop {
                let _ = fleet.pause(&id, PauseOrder::by("api")).await;
                tokio::task::yield_now().await;
            }
        }
    });
    for request in requests {
        request.await.unwrap();
    }
    pauses.abort();
    assert_eq!(
        world.exec(&id, "count").await,
        Ok(2001),
        "no count was lost or repeated"
    );
}

#[tokio::test]
async fn machines_are_restored_a_few_at_a_time_and_the_others_wait_their_turn() {
    let world = World::with(Settings {
        max_restoring: 1,
        ..Settings::default()
    });
    let (first, second) = (world.create().await, world.create().await);
    world.pause(&first).await.unwrap();
    world.pause(&second).await.unwrap();
    let hold = world.host.faults().hold(Point::Restore);
    let touch = |id: MachineId| {
        let fleet = world.fleet.clone();
        tokio::spawn(async move {
            let woken = fleet.wake(&id, WakeSource::Http, serde_json::Value::Null).await;
            woken.map(drop)
        })
    };
    let first = touch(first);
    hold.arrived().await;
    let waiting = touch(second.clone());
    world.reaches(&second, MachineStatus::Waking).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished(), "restored beside another one");
    hold.release();
    first.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
}
