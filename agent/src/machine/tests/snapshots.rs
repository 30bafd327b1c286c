//! Snapshots, machines made from them, and forks: over a simulated host.

use super::super::fleet::{ForkOrder, Settings, SnapshotOrder, TemplateSnapshotOrder};
use super::super::retention;
use super::super::simulated::{Fault, Point};
use super::*;
use crate::store::{Idempotency, SnapshotFilter};
use torpor_api::http::{CreateSnapshot, ForkMachine, Snapshot};
use torpor_api::vmm::ExitReason;
use torpor_api::{ErrorCode, SnapshotId};

impl World {
    async fn snapshot(&self, id: &MachineId) -> Result<Snapshot, MachineError> {
        self.fleet.snapshot(id, SnapshotOrder::default()).await
    }

    async fn go_on_from(&self, snapshot: &SnapshotId) -> Result<MachineId, MachineError> {
        self.create_from(serde_json::json!({ "snapshot": snapshot }))
            .await
    }

    async fn fork(&self, id: &MachineId, count: u32) -> Result<Vec<MachineId>, MachineError> {
        let body = ForkMachine {
            count,
            ..ForkMachine::default()
        };
        let order = ForkOrder {
            body,
            idempotency: None,
        };
        let forked = self.fleet.fork(id, order).await?;
        Ok(forked.machines.into_iter().map(|machine| machine.id).collect())
    }

    async fn all_snapshots(&self) -> Vec<Snapshot> {
        let filter = SnapshotFilter {
            limit: 100,
            ..SnapshotFilter::default()
        };
        self.fleet.snapshots(filter).await.unwrap()
    }
}

#[tokio::test]
async fn a_running_machine_is_the_same_execution_before_and_after_its_snapshot() {
    let world = World::new();
    let id = world.create().await;
    world.exec(&id, "count").await.unwrap();
    let before = world.view(&id).await;
    let snapshot = world.snapshot(&id).await.unwrap();
    let after = world.view(&id).await;
    assert_eq!(
        (
            after.status,
            after.execution_id.clone(),
            after.pauses,
            after.wakes
        ),
        (MachineStatus::Running, before.execution_id, 0, 0)
    );
    assert_eq!(
        (snapshot.machine_id, snapshot.execution_id),
        (id.clone(), after.execution_id)
    );
    assert_eq!(
        world.exec(&id, "count").await.unwrap(),
        2,
        "its memory was not touched"
    );
    assert_eq!(world.host.n_restores(), 0);
    assert_eq!(world.count(&id, "snapshot.created").await, 1);
}

#[tokio::test]
async fn a_machine_made_from_a_snapshot_goes_on_at_its_instant_as_another_machine() {
    let world = World::new();
    let id = world.create().await;
    for program in ["count", "count", "write"] {
        world.exec(&id, program).await.unwrap();
    }
    let snapshot = world.snapshot(&id).await.unwrap().id;
    for program in ["count", "write", "write"] {
        world.exec(&id, program).await.unwrap();
    }
    let other = world.go_on_from(&snapshot).await.unwrap();
    assert_eq!(world.host.n_forks(), 1, "its identity is new");
    assert_eq!(world.view(&other).await.snapshot_id, Some(snapshot.clone()));
    assert_eq!(world.exec(&other, "count").await.unwrap(), 3);
    assert_eq!(world.exec(&other, "read").await.unwrap(), 1);
    // Its own pause and wake lead to its own memory.
    world.pause(&other).await.unwrap();
    assert_eq!(world.exec(&other, "count").await.unwrap(), 4);
    assert_eq!(world.host.n_forks(), 1, "a wake is no fork");
    assert_eq!(world.exec(&id, "count").await.unwrap(), 4);
    assert_eq!(world.exec(&id, "read").await.unwrap(), 3);
    // And the snapshot is as it was.
    let third = world.go_on_from(&snapshot).await.unwrap();
    assert_eq!(world.exec(&third, "count").await.unwrap(), 3);
}

#[tokio::test]
async fn a_snapshot_of_a_paused_machine_does_not_wake_it() {
    let world = World::new();
    let id = world.create().await;
    world.exec(&id, "count").await.unwrap();
    world.pause(&id).await.unwrap();
    let snapshot = world.snapshot(&id).await.unwrap();
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
    assert_eq!((world.host.n_restores(), snapshot.execution_id), (0, None));
    let other = world.go_on_from(&snapshot.id).await.unwrap();
    assert_eq!(world.exec(&other, "count").await.unwrap(), 2);
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
}

#[tokio::test]
async fn a_request_during_a_snapshot_waits_for_it_and_fails_neither() {
    let world = World::new();
    for paused in [false, true] {
        let id = world.create().await;
        if paused {
            world.pause(&id).await.unwrap();
        }
        let hold = world.host.faults().hold(Point::StageSnapshot);
        let (fleet, source) = (world.fleet.clone(), id.clone());
        let snapshot = tokio::spawn(async move { fleet.snapshot(&source, SnapshotOrder::default()).await });
        hold.arrived().await;
        let shown = world.status(&id).await;
        assert_eq!(
            shown,
            if paused {
                MachineStatus::Paused
            } else {
                MachineStatus::Running
            }
        );
        let (touched, ()) = tokio::join!(world.touch(&id), async {
            tokio::task::yield_now().await;
            hold.release();
        });
        touched.unwrap();
        snapshot.await.unwrap().unwrap();
        world.reaches(&id, MachineStatus::Running).await;
    }
}

#[tokio::test]
async fn a_snapshot_that_is_wanted_during_a_wake_waits_for_its_end() {
    let world = World::new();
    let id = world.create().await;
    world.pause(&id).await.unwrap();
    let hold = world.host.faults().hold(Point::Restore);
    let (touched, taken, ()) = tokio::join!(world.touch(&id), world.snapshot(&id), async {
        hold.arrived().await;
        hold.release();
    });
    touched.unwrap();
    taken.unwrap();
    assert_eq!(world.status(&id).await, MachineStatus::Running);
}

#[tokio::test]
async fn a_snapshot_that_fails_leaves_a_running_machine_and_nothing_else() {
    let world = World::new();
    let id = world.create().await;
    world.exec(&id, "count").await.unwrap();
    let points = [
        (Point::Freeze, ErrorCode::SnapshotFailed),
        (Point::Persist, ErrorCode::DiskFull),
        (Point::StageSnapshot, ErrorCode::DiskFull),
        (Point::CommitSnapshot, ErrorCode::SnapshotFailed),
    ];
    for (n, (point, code)) in points.into_iter().enumerate() {
        world.host.faults().at(point, Fault::Fail(code));
        let error = world.snapshot(&id).await.unwrap_err();
        assert_eq!(error.code, code, "{point:?}");
        assert_eq!(world.status(&id).await, MachineStatus::Running);
        assert_eq!(world.exec(&id, "count").await.unwrap(), 2 + n as u64);
        assert!(world.host.snapshots_on_disk().is_empty() && world.all_snapshots().await.is_empty());
    }
    // A pause that follows is not confused by the images that those left.
    world.pause(&id).await.unwrap();
    assert_eq!(world.exec(&id, "count").await.unwrap(), 6);
}

#[tokio::test]
async fn a_vmm_that_dies_during_a_snapshot_is_told_of_and_the_machine_goes_on() {
    for point in [Point::Freeze, Point::Persist, Point::Persisted, Point::Run] {
        let world = World::new();
        let id = world.create().await;
        world.exec(&id, "count").await.unwrap();
        world.host.faults().at(point, Fault::Die);
        let taken = world.snapshot(&id).await;
        assert_eq!(taken.is_ok(), point == Point::Run, "{point:?}: {taken:?}");
        let counted = world.exec(&id, "count").await.unwrap();
        // An image that was complete is resumed, everything else boots.
        assert_eq!(
            counted,
            if matches!(point, Point::Persisted | Point::Run) {
                2
            } else {
                1
            }
        );
    }
}

#[tokio::test]
async fn a_machine_that_is_deleted_during_its_snapshot_is_gone() {
    let world = World::new();
    let id = world.create().await;
    let hold = world.host.faults().hold(Point::StageSnapshot);
    let (fleet, source) = (world.fleet.clone(), id.clone());
    let snapshot = tokio::spawn(async move { fleet.snapshot(&source, SnapshotOrder::default()).await });
    hold.arrived().await;
    world.delete(&id).await.unwrap();
    assert!(snapshot.await.unwrap().is_err());
    assert!(world.all_snapshots().await.is_empty());
}

#[tokio::test]
async fn a_stopped_machine_has_no_memory_to_take() {
    let world = World::new();
    let id = world.create().await;
    world.host.live(&id)[0].end(ExitReason::Shutdown);
    world.reaches(&id, MachineStatus::Stopped).await;
    let error = world.snapshot(&id).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::MachineNotReady);
    assert!(world.all_snapshots().await.is_empty());
}

#[tokio::test]
async fn the_same_digest_and_the_same_key_answer_the_same_snapshot() {
    let world = World::new();
    let id = world.create().await;
    let order = |digest: Option<&str>, key: Option<&str>| SnapshotOrder {
        body: CreateSnapshot {
            digest: digest.map(str::to_owned),
            ..CreateSnapshot::default()
        },
        idempotency: key.map(|key| Idempotency {
            key: key.to_owned(),
            body_digest: "b".to_owned(),
        }),
    };
    let (a, b) = tokio::join!(
        world.fleet.snapshot(&id, order(Some("d"), None)),
        world.fleet.snapshot(&id, order(Some("d"), None))
    );
    assert_eq!(a.unwrap().id, b.unwrap().id);
    let c = world.fleet.snapshot(&id, order(None, Some("k"))).await.unwrap();
    let d = world.fleet.snapshot(&id, order(None, Some("k"))).await.unwrap();
    assert_eq!(c.id, d.id);
    assert_eq!(world.all_snapshots().await.len(), 2);
}

#[tokio::test]
async fn a_restart_in_the_middle_leaves_whole_snapshots_only_and_running_machines() {
    for point in [Point::Freeze, Point::Persist, Point::StageSnapshot, Point::Run] {
        let mut world = World::new();
        let id = world.create().await;
        world.exec(&id, "count").await.unwrap();
        let kept = world.snapshot(&id).await.unwrap().id;
        let hold = world.host.faults().hold(point);
        let (fleet, source) = (world.fleet.clone(), id.clone());
        let snapshot = tokio::spawn(async move { fleet.snapshot(&source, SnapshotOrder::default()).await });
        hold.arrived().await;
        world.restart().await;
        assert!(snapshot.await.unwrap().is_err());
        world.reaches(&id, MachineStatus::Running).await;
        assert_eq!(world.exec(&id, "count").await.unwrap(), 2, "{point:?}");
        assert_eq!(world.host.snapshots_on_disk(), std::slice::from_ref(&kept));
        assert_eq!(world.all_snapshots().await.len(), 1);
        let other = world.go_on_from(&kept).await.unwrap();
        assert_eq!(world.exec(&other, "count").await.unwrap(), 2);
    }
}

#[tokio::test]
async fn a_deletion_that_was_cut_short_is_finished_and_forks_do_not_need_the_snapshot() {
    let mut world = World::new();
    let id = world.create().await;
    world.exec(&id, "count").await.unwrap();
    let snapshot = world.snapshot(&id).await.unwrap().id;
    let other = world.go_on_from(&snapshot).await.unwrap();
    world
        .host
        .faults()
        .at(Point::DeleteSnapshot, Fault::Fail(ErrorCode::Internal));
    world.fleet.delete_snapshot(&snapshot).await.unwrap_err();
    let error = world.go_on_from(&snapshot).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::SnapshotNotFound);
    world.restart().await;
    assert!(world.host.snapshots_on_disk().is_empty() && world.all_snapshots().await.is_empty());
    world.pause(&other).await.unwrap();
    assert_eq!(world.exec(&other, "count").await.unwrap(), 2);
}

#[tokio::test]
async fn forks_go_on_where_the_source_is_with_its_policies_and_leave_no_snapshot() {
    let world = World::new();
    let body = serde_json::json!({
        "services": [{ "name": "web", "port": 80 }],
        "lease": { "seconds": 60, "action": "pause" },
        "metadata": { "k": "v" },
        "wake": { "ssh": false },
    });
    let id = world.create_from(body).await.unwrap();
    world.exec(&id, "count").await.unwrap();
    let forks = world.fork(&id, 3).await.unwrap();
    assert_eq!(
        (forks.len(), world.host.n_forks(), world.host.n_boots()),
        (3, 3, 1)
    );
    let source = world.view(&id).await;
    for fork in &forks {
        let view = world.view(fork).await;
        assert_eq!(
            (view.status, view.wake, view.metadata),
            (MachineStatus::Running, source.wake, source.metadata.clone())
        );
        assert_eq!(view.lease.unwrap().policy, source.lease.clone().unwrap().policy);
        assert_ne!(view.services[0].listen_port, source.services[0].listen_port);
        assert_eq!(world.exec(fork, "count").await.unwrap(), 2);
    }
    assert!(world.host.snapshots_on_disk().is_empty());
    assert_eq!(world.exec(&id, "count").await.unwrap(), 2);
}

#[tokio::test]
async fn forks_are_all_made_or_none_and_a_repeat_makes_no_more() {
    let world = World::new();
    let id = world.create().await;
    world
        .host
        .faults()
        .at(Point::CloneSnapshot, Fault::Fail(ErrorCode::DiskFull));
    let error = world.fork(&id, 3).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::DiskFull);
    assert_eq!(world.host.machines_with_files(), std::slice::from_ref(&id));
    assert!(world.host.snapshots_on_disk().is_empty());
    let order = ForkOrder {
        body: ForkMachine {
            count: 2,
            ..ForkMachine::default()
        },
        idempotency: Some(Idempotency {
            key: "k".to_owned(),
            body_digest: "b".to_owned(),
        }),
    };
    let ids =
        |forked: torpor_api::http::Forked| forked.machines.into_iter().map(|m| m.id).collect::<Vec<_>>();
    let first = ids(world.fleet.fork(&id, order.clone()).await.unwrap());
    assert_eq!(first, ids(world.fleet.fork(&id, order).await.unwrap()));
    assert_eq!(world.host.machines_with_files().len(), 3);
}

#[tokio::test]
async fn a_shape_that_is_not_the_snapshots_is_refused() {
    let world = World::new();
    let id = world.create().await;
    let snapshot = world.snapshot(&id).await.unwrap().id;
    for body in [
        serde_json::json!({ "snapshot": snapshot, "vcpus": 3 }),
        serde_json::json!({ "snapshot": snapshot, "mem_mib": 512 }),
        serde_json::json!({ "snapshot": snapshot, "disk_mib": 4096 }),
    ] {
        let error = world.create_from(body).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidRequest);
    }
    let error = world
        .create_from(serde_json::json!({ "snapshot": "none" }))
        .await
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::SnapshotNotFound);
}

#[tokio::test]
async fn a_retention_counts_from_the_last_use() {
    let world = World::new();
    let timer = tokio::spawn(retention::run(world.fleet.clone()));
    let id = world.create().await;
    let body = CreateSnapshot {
        retention_seconds: Some(60),
        ..CreateSnapshot::default()
    };
    let snapshot = world.fleet.snapshot(&id, body.into()).await.unwrap();
    assert_eq!(
        snapshot.retention.unwrap().expires_unix_ms,
        START_UNIX_MS + 60_000
    );
    world.clock.sleeper_at(START_UNIX_MS + 60_000).await;
    world.clock.advance(Duration::from_secs(50));
    world.go_on_from(&snapshot.id).await.unwrap();
    world.clock.sleeper_at(START_UNIX_MS + 110_000).await;
    world.clock.advance(Duration::from_secs(59));
    assert_eq!(world.all_snapshots().await.len(), 1);
    world.clock.advance(Duration::from_secs(1));
    let gone = async {
        while !world.host.snapshots_on_disk().is_empty() || !world.all_snapshots().await.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap();
    timer.abort();
}

fn warm_world() -> World {
    World::with(Settings {
        warm_templates: true,
        ..Settings::default()
    })
}

impl World {
    async fn warmed(&self) {
        let committed = async {
            while self.fleet.store().ready_snapshots().await.unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), committed)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn the_second_machine_of_a_shape_begins_with_a_restore() {
    let mut world = warm_world();
    let first = world.create().await;
    world.warmed().await;
    assert_eq!(world.exec(&first, "count").await.unwrap(), 1);
    for _ in 0..2 {
        let id = world.create().await;
        assert_eq!(world.exec(&id, "count").await.unwrap(), 1);
        assert_eq!(world.view(&id).await.snapshot_id, None);
        world.pause(&id).await.unwrap();
        assert_eq!(world.exec(&id, "count").await.unwrap(), 2);
        // Also after a restart.
        world.restart().await;
    }
    assert_eq!((world.host.n_boots(), world.host.n_forks()), (1, 2));
    let other = world
        .create_from(serde_json::json!({ "mem_mib": 512 }))
        .await
        .unwrap();
    assert_eq!(world.exec(&other, "count").await.unwrap(), 1);
    assert_eq!(world.host.n_boots(), 2);
    assert!(world.all_snapshots().await.is_empty(), "users don't see them");
    // The first one's own pauses go on from the image that the warm template was made with.
    world.pause(&first).await.unwrap();
    assert_eq!(world.exec(&first, "count").await.unwrap(), 2);
}

#[tokio::test]
async fn a_warm_template_that_cannot_be_made_or_used_costs_no_create() {
    for point in [Point::Freeze, Point::Persist, Point::StageSnapshot] {
        let world = warm_world();
        world.host.faults().at(point, Fault::Fail(ErrorCode::DiskFull));
        let id = world.create().await;
        assert_eq!(world.exec(&id, "count").await.unwrap(), 1, "{point:?}");
        world.pause(&id).await.unwrap();
        assert_eq!(world.exec(&id, "count").await.unwrap(), 2, "{point:?}");
    }
    for point in [Point::CloneSnapshot, Point::Restore] {
        let world = warm_world();
        world.create().await;
        world.warmed().await;
        world
            .host
            .faults()
            .at(point, Fault::Fail(ErrorCode::ImageIncompatible));
        let id = world.create().await;
        assert_eq!(world.exec(&id, "count").await.unwrap(), 1);
        assert_eq!(world.host.n_boots(), 2, "{point:?}");
        // The next boot makes another.
        world.create().await;
        world.warmed().await;
        world.create().await;
        assert_eq!(world.host.n_boots(), 3, "{point:?}");
    }
}

#[tokio::test]
async fn a_snapshot_of_a_template_leaves_no_machine() {
    for warm in [false, true] {
        let world = World::with(Settings {
            warm_templates: warm,
            ..Settings::default()
        });
        let order = TemplateSnapshotOrder {
            machine: torpor_api::http::CreateMachine::default(),
            snapshot: SnapshotOrder::default(),
        };
        let snapshot = world.fleet.snapshot_template(order).await.unwrap();
        assert!(world.host.machines_with_files().is_empty());
        let id = world.go_on_from(&snapshot.id).await.unwrap();
        assert_eq!(world.exec(&id, "count").await.unwrap(), 1);
    }
}
