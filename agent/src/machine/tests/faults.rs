//! Injected faults: nothing is lost, and the cause is told.

use super::super::fleet::MachineQuery;
use super::super::simulated::{Fault, Point};
use super::*;
use torpor_api::ErrorCode;
use torpor_api::vmm::ExitReason;

#[tokio::test]
async fn a_pause_that_fails_leaves_the_machine_running_and_says_why() {
    for (point, code) in [
        (Point::Freeze, ErrorCode::PauseFailed),
        (Point::Persist, ErrorCode::DiskFull),
        (Point::Persist, ErrorCode::PauseFailed),
    ] {
        let world = World::new();
        let id = world.create().await;
        world.exec(&id, "count").await.unwrap();
        let before = world.view(&id).await.execution_id;
        world.host.faults().at(point, Fault::Fail(code));
        assert_eq!(world.pause(&id).await.unwrap_err().code, code);
        let after = world.view(&id).await;
        assert_eq!(
            (after.status, after.execution_id),
            (MachineStatus::Running, before)
        );
        assert_eq!(after.last_error.unwrap().code, code);
        assert_eq!(world.count(&id, "machine.pause_failed").await, 1);
        assert_eq!(world.exec(&id, "count").await, Ok(2));
        world.pause(&id).await.unwrap();
        assert_eq!(
            world.view(&id).await.last_error,
            None,
            "the next success clears it"
        );
    }
}

#[tokio::test]
async fn a_vmm_that_dies_while_pausing_leaves_the_newest_image_that_fits() {
    for (point, expected) in [
        (Point::Freeze, MachineStatus::Stopped),
        (Point::Persist, MachineStatus::Stopped),
        (Point::Persisted, MachineStatus::Paused),
    ] {
        let world = World::new();
        let id = world.create().await;
        world.exec(&id, "write").await.unwrap();
        world.exec(&id, "count").await.unwrap();
        world.host.faults().at(point, Fault::Die);
        let _ = world.pause(&id).await;
        world.reaches(&id, expected).await;
        assert!(world.host.live(&id).is_empty());
        let counted = if expected == MachineStatus::Paused { 2 } else { 1 };
        assert_eq!(world.exec(&id, "count").await, Ok(counted), "{point:?}");
        assert_eq!(world.exec(&id, "read").await, Ok(1), "the disk is kept");
    }
}

#[tokio::test]
async fn memory_of_a_lost_vmm_is_rolled_back_only_if_the_disk_was_not_written() {
    for (program, expected, event) in [
        ("count", MachineStatus::Paused, "machine.memory_rolled_back"),
        ("write", MachineStatus::Stopped, "machine.memory_lost"),
    ] {
        let world = World::new();
        let id = world.create().await;
        world.pause(&id).await.unwrap();
        world.resume(&id).await.unwrap();
        world.exec(&id, program).await.unwrap();
        world.host.live(&id)[0].end(ExitReason::Failed {
            message: "killed".to_owned(),
        });
        world.reaches(&id, expected).await;
        assert_eq!(
            world.view(&id).await.last_error.unwrap().code,
            ErrorCode::Internal
        );
        assert_eq!(world.count(&id, event).await, 1);
        world.touch(&id).await.unwrap();
    }
}

#[tokio::test]
async fn a_corrupt_image_is_refused_once_and_can_be_given_up() {
    let world = World::new();
    let id = world.create().await;
    world.exec(&id, "write").await.unwrap();
    world.pause(&id).await.unwrap();
    world.host.damage_image(&id);
    for _ in 0..3 {
        assert_eq!(world.touch(&id).await.unwrap_err().code, ErrorCode::ImageCorrupt);
    }
    assert_eq!(
        world.host.n_restores(),
        1,
        "a refused image is not tried for ever"
    );
    let view = world.view(&id).await;
    assert_eq!(
        (view.status, view.last_error.unwrap().code),
        (MachineStatus::Paused, ErrorCode::ImageCorrupt)
    );
    assert_eq!(world.resume(&id).await.unwrap_err().code, ErrorCode::ImageCorrupt);
    assert_eq!(world.host.n_restores(), 2, "an explicit resume tries");
    world.fleet.resume(&id, ResumeFrom::Disk).await.unwrap();
    assert_eq!(world.exec(&id, "read").await, Ok(1));
    world.pause(&id).await.unwrap();
    world.touch(&id).await.unwrap();
}

#[tokio::test]
async fn a_corrupt_page_stops_the_machine_and_its_disk_boots() {
    let world = World::new();
    let id = world.create().await;
    world.exec(&id, "write").await.unwrap();
    world.host.live(&id)[0].end(ExitReason::Memory {
        message: "page 7".to_owned(),
    });
    world.reaches(&id, MachineStatus::Stopped).await;
    assert_eq!(
        world.view(&id).await.last_error.unwrap().code,
        ErrorCode::ImageCorrupt
    );
    assert_eq!(world.exec(&id, "read").await, Ok(1));
}

#[tokio::test]
async fn a_restore_that_fails_for_a_passing_reason_can_be_tried_again() {
    let world = World::new();
    let id = world.create().await;
    world.exec(&id, "count").await.unwrap();
    world.pause(&id).await.unwrap();
    world
        .host
        .faults()
        .at(Point::Restore, Fault::Fail(ErrorCode::ResumeFailed));
    assert_eq!(world.touch(&id).await.unwrap_err().code, ErrorCode::ResumeFailed);
    let view = world.view(&id).await;
    assert_eq!(
        (view.status, view.last_error.unwrap().code),
        (MachineStatus::Paused, ErrorCode::ResumeFailed)
    );
    assert_eq!(world.exec(&id, "count").await, Ok(2));
    assert_eq!(world.view(&id).await.last_error, None);
}

#[tokio::test]
async fn a_guest_that_powers_off_is_stopped_and_boots_when_it_is_needed() {
    let world = World::new();
    let id = world.create().await;
    world.exec(&id, "write").await.unwrap();
    world.host.live(&id)[0].end(ExitReason::Shutdown);
    world.reaches(&id, MachineStatus::Stopped).await;
    assert_eq!(
        world.pause(&id).await.unwrap_err().code,
        ErrorCode::MachineNotReady
    );
    assert_eq!(world.exec(&id, "read").await, Ok(1));
    assert_eq!(world.host.n_boots(), 2);
    assert_eq!(world.count(&id, "machine.stopped").await, 1);
}

#[tokio::test]
async fn a_guest_that_reboots_gets_a_new_execution() {
    let world = World::new();
    let id = world.create().await;
    let before = world.view(&id).await.execution_id;
    let hold = world.host.faults().hold(Point::Boot);
    world.host.live(&id)[0].end(ExitReason::Reboot);
    hold.arrived().await;
    assert_eq!(world.status(&id).await, MachineStatus::Starting);
    hold.release();
    world.reaches(&id, MachineStatus::Running).await;
    world.resume(&id).await.unwrap();
    assert_ne!(world.view(&id).await.execution_id, before);
    assert_eq!(world.count(&id, "machine.rebooted").await, 1);
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing() {
    let world = World::new();
    world
        .host
        .faults()
        .at(Point::Boot, Fault::Fail(ErrorCode::BootFailed));
    let body = serde_json::json!({ "name": "half", "services": [{ "port": 80 }] });
    let error = world.create_from(body.clone()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::BootFailed);
    assert!(
        world
            .fleet
            .list(&MachineQuery::default(), None, 10)
            .await
            .unwrap()
            .is_empty()
    );
    assert!(world.host.machines_with_files().is_empty());
    assert!(world.fleet.routes().find(20_000).is_none());
    world.create_from(body).await.expect("the name is free again");
}

#[tokio::test]
async fn a_deletion_that_fails_is_taken_up_again() {
    let world = World::new();
    let id = world.create().await;
    world
        .host
        .faults()
        .at(Point::DeleteFiles, Fault::Fail(ErrorCode::Internal));
    assert_eq!(world.delete(&id).await.unwrap_err().code, ErrorCode::Internal);
    assert_eq!(world.status(&id).await, MachineStatus::Deleting);
    world.delete(&id).await.unwrap();
    assert!(world.fleet.view(&id).await.is_err());
}

#[test]
fn every_event_that_is_stored_is_documented() {
    let documented = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/events.md"));
    let sources = [
        include_str!("../driver/commit.rs"),
        include_str!("../driver/effects.rs"),
        include_str!("../driver/operation.rs"),
        include_str!("../fleet.rs"),
        include_str!("../fleet/create.rs"),
        include_str!("../fleet/policy.rs"),
    ];
    let mut n_kinds = 0;
    for text in sources.iter().flat_map(|source| source.split('"')) {
        if text.starts_with("machine.") || text.starts_with("service.") {
            n_kinds += 1;
            assert!(
                documented.contains(&format!("`{text}`")),
                "{text} is not in docs/events.md"
            );
        }
    }
    assert!(n_kinds > 15, "the sources are no longer where this test looks");
}
