//! torpord is killed at any point and started again over the same host and store.

use super::super::hypervisor::MachineSpec;
use super::super::simulated::Point;
use super::*;
use crate::store::{NewEvent, NewMachine};
use torpor_api::ErrorCode;

#[tokio::test]
async fn a_running_machine_is_taken_over_as_it_runs() {
    let mut world = World::new();
    let id = world
        .create_from(serde_json::json!({ "lease": { "seconds": 60, "action": "pause" } }))
        .await
        .unwrap();
    world.exec(&id, "count").await.unwrap();
    let before = world.view(&id).await;
    world.restart().await;
    assert_eq!(
        world.status(&id).await,
        MachineStatus::Running,
        "never shown as anything else"
    );
    assert_eq!(world.exec(&id, "count").await, Ok(2));
    let after = world.view(&id).await;
    assert_eq!(
        (after.execution_id, after.lease),
        (before.execution_id, before.lease)
    );
    assert_eq!(world.host.n_restores(), 0);
}

#[tokio::test]
async fn a_kill_at_any_point_of_a_pause_or_wake_loses_nothing() {
    for point in [
        Point::Freeze,
        Point::Persist,
        Point::Persisted,
        Point::Quit,
        Point::Restore,
    ] {
        let mut world = World::new();
        let id = world.create().await;
        world.exec(&id, "count").await.unwrap();
        if point == Point::Restore {
            world.pause(&id).await.unwrap();
        }
        let hold = world.host.faults().hold(point);
        let (fleet, machine) = (world.fleet.clone(), id.clone());
        let operation = tokio::spawn(async move {
            if point == Point::Restore {
                fleet.resume(&machine, ResumeFrom::Memory).await
            } else {
                fleet.pause(&machine, PauseOrder::by("api")).await
            }
        });
        hold.arrived().await;
        operation.abort();
        world.restart().await;
        assert_eq!(world.exec(&id, "count").await, Ok(2), "{point:?}");
        world.pause(&id).await.unwrap();
        assert_eq!(world.exec(&id, "count").await, Ok(3), "{point:?}");
    }
}

#[tokio::test]
async fn after_a_power_cut_memory_is_rolled_back_or_lost_and_told() {
    for (program, expected, event) in [
        ("count", MachineStatus::Paused, "machine.memory_rolled_back"),
        ("write", MachineStatus::Stopped, "machine.memory_lost"),
    ] {
        let mut world = World::new();
        let id = world.create().await;
        world.exec(&id, "count").await.unwrap();
        world.pause(&id).await.unwrap();
        world.resume(&id).await.unwrap();
        world.exec(&id, program).await.unwrap();
        world.host.cut_power();
        world.restart().await;
        world.reaches(&id, expected).await;
        while world.count(&id, event).await == 0 {
            tokio::task::yield_now().await;
        }
        let counted = if expected == MachineStatus::Paused { 2 } else { 1 };
        assert_eq!(world.exec(&id, "count").await, Ok(counted));
    }
}

#[tokio::test]
async fn who_is_inside_a_running_machine_finds_it_after_a_restart_without_waking_anything() {
    let mut world = World::new();
    let id = world.create().await;
    world.restart().await;
    assert!(world.fleet.enter_quietly(&id).is_some());
    assert_eq!(world.count(&id, "machine.woken").await, 0);
}

#[tokio::test]
async fn a_machine_that_was_being_created_is_rolled_back() {
    let mut world = World::new();
    let id = MachineId::generate();
    let event = NewEvent {
        at_unix_ms: START_UNIX_MS,
        machine: id.clone(),
        execution: None,
        kind: "machine.created",
        actor: "api",
        detail: serde_json::Value::Null,
    };
    let spec = MachineSpec {
        id: id.clone(),
        template: "base".to_owned(),
        template_digest: "sha256:0".to_owned(),
        vcpus: 1,
        mem_mib: 256,
        disk_mib: 512,
    };
    let new = NewMachine {
        activity: torpor_api::activity::ActivityPolicy::default(),
        retention_seconds: None,
        spec,
        name: None,
        lease: None,
        wake: torpor_api::http::WakePolicy::default(),
        services: Vec::new(),
        metadata: std::collections::BTreeMap::new(),
        env: std::collections::BTreeMap::new(),
        cwd: None,
        snapshot: None,
        hidden: false,
        idempotency: None,
        event,
    };
    world.fleet.store().create_machine(new).await.unwrap();
    world.restart().await;
    while world.fleet.view(&id).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        world.fleet.view(&id).await.unwrap_err().code,
        ErrorCode::MachineNotFound
    );
}

#[tokio::test]
async fn a_deletion_that_was_cut_short_is_finished() {
    let mut world = World::new();
    let id = world.create().await;
    let hold = world.host.faults().hold(Point::DeleteFiles);
    let (fleet, machine) = (world.fleet.clone(), id.clone());
    let deletion = tokio::spawn(async move { fleet.delete(&machine, PauseOrder::by("api")).await });
    hold.arrived().await;
    deletion.abort();
    world.restart().await;
    while world.fleet.view(&id).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(world.host.machines_with_files().is_empty());
}

#[tokio::test]
async fn the_vmm_of_a_machine_that_nobody_knows_is_ended() {
    let mut world = World::new();
    let id = world.create().await;
    let event = world
        .fleet
        .event(&id, "machine.deleted", "api", serde_json::Value::Null);
    world
        .fleet
        .store()
        .remove_machine(id.clone(), event)
        .await
        .unwrap();
    world.restart().await;
    assert!(world.host.live(&id).is_empty());
}

#[tokio::test]
async fn services_keep_their_ports() {
    let mut world = World::new();
    let id = world
        .create_from(serde_json::json!({ "services": [{ "port": 80 }, { "port": 81 }] }))
        .await
        .unwrap();
    let before = world.view(&id).await.services;
    world.restart().await;
    assert_eq!(world.view(&id).await.services, before);
    for service in before {
        assert_eq!(
            world.fleet.routes().find(service.listen_port).unwrap().port,
            service.port
        );
    }
}
