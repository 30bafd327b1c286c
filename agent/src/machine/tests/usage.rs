//! What keeps a machine with a sliding lease awake, under a clock that stands still until it is moved.

use super::super::clock::Clock;
use super::super::leases;
use super::super::usage::{self, LOOK_EVERY, RunUsage};
use super::*;
use torpor_api::activity::{ActivitySource, PatchActivity};

const WINDOW: Duration = Duration::from_secs(60);

struct Metered {
    world: World,
    id: MachineId,
}

impl Metered {
    /// A running machine with a sliding lease of a minute, and both timers.
    async fn new(activity: serde_json::Value) -> Self {
        let world = World::new();
        tokio::spawn(leases::run(world.fleet.clone()));
        tokio::spawn(usage::run(world.fleet.clone()));
        let lease = serde_json::json!({ "seconds": 60, "action": "pause", "mode": "sliding" });
        let body = serde_json::json!({ "lease": lease, "activity": activity });
        let id = world.create_from(body).await.unwrap();
        Self { world, id }
    }

    /// So many seconds pass, in each of which the guest uses this much.
    async fn pass(&self, seconds: u64, cpu_ms: u64, outbound_bytes: u64) {
        let mut used = RunUsage::default();
        for _ in 0..seconds {
            used.cpu_us += cpu_ms * 1000;
            used.outbound_bytes += outbound_bytes;
            if let Some(live) = self.world.host.live(&self.id).first() {
                live.set_usage(used);
            }
            let next = self.world.clock.now_unix_ms() + 1000;
            self.world.clock.sleeper_at(next).await;
            self.world.clock.advance(Duration::from_secs(1));
            // Whoever was woken gets to its end.
            for _ in 0..50 {
                tokio::task::yield_now().await;
            }
        }
    }

    async fn status(&self) -> MachineStatus {
        self.world.status(&self.id).await
    }

    fn sources(&self) -> Vec<ActivitySource> {
        let policy = torpor_api::activity::ActivityPolicy::default();
        let signs = self.world.fleet.activity_of(&self.id, &policy);
        signs.into_iter().map(|sign| sign.source).collect()
    }
}

#[tokio::test]
async fn traffic_of_the_guests_own_and_busy_processors_keep_a_machine_awake() {
    for (cpu_ms, outbound_bytes, source) in
        [(300, 0, ActivitySource::Cpu), (0, 2000, ActivitySource::Outbound)]
    {
        let machine = Metered::new(serde_json::json!({})).await;
        machine.pass(200, cpu_ms, outbound_bytes).await;
        assert_eq!(machine.status().await, MachineStatus::Running, "{source:?}");
        assert!(machine.sources().contains(&source));
        machine.pass(90, 0, 0).await;
        machine.world.reaches(&machine.id, MachineStatus::Paused).await;
    }
}

#[tokio::test]
async fn keep_alives_and_idle_ticks_keep_nothing_awake() {
    let machine = Metered::new(serde_json::json!({})).await;
    machine.pass(WINDOW.as_secs() + 20, 10, 20).await;
    machine.world.reaches(&machine.id, MachineStatus::Paused).await;
}

#[tokio::test]
async fn a_source_that_is_switched_off_counts_for_nothing_and_the_switch_survives_a_resume() {
    let machine = Metered::new(serde_json::json!({ "cpu": false, "outbound": false })).await;
    for _ in 0..2 {
        machine.pass(WINDOW.as_secs() + 20, 900, 100_000).await;
        machine.world.reaches(&machine.id, MachineStatus::Paused).await;
        machine.world.resume(&machine.id).await.unwrap();
    }
    let patch = PatchActivity {
        cpu: Some(true),
        ..PatchActivity::default()
    };
    let policy = machine
        .world
        .fleet
        .patch_activity(&machine.id, patch)
        .await
        .unwrap();
    assert!(policy.cpu && !policy.outbound && policy.proxy);
    machine.pass(200, 900, 0).await;
    assert_eq!(machine.status().await, MachineStatus::Running);
}

#[tokio::test]
async fn requests_count_only_where_they_may() {
    for (activity, expected) in [
        (serde_json::json!({}), MachineStatus::Running),
        (serde_json::json!({ "proxy": false }), MachineStatus::Paused),
    ] {
        let machine = Metered::new(activity.clone()).await;
        machine.pass(40, 0, 0).await;
        if machine.status().await == MachineStatus::Running {
            machine.world.touch(&machine.id).await.unwrap();
        }
        machine.pass(40, 0, 0).await;
        machine.world.reaches(&machine.id, expected).await;
    }
}

#[tokio::test]
async fn no_lease_ends_before_the_least_time_awake() {
    for mode in ["sliding", "absolute"] {
        let world = World::new();
        tokio::spawn(leases::run(world.fleet.clone()));
        let lease = serde_json::json!({ "seconds": 10, "action": "pause", "mode": mode });
        let body = serde_json::json!({ "lease": lease, "activity": { "min_awake_seconds": 60 } });
        let id = world.create_from(body).await.unwrap();
        for _ in 0..3 {
            let began = world.clock.now_unix_ms();
            world.clock.sleeper_at(began + 10_000).await;
            world.clock.advance(Duration::from_secs(10));
            world.clock.sleeper_at(began + 60_000).await;
            assert_eq!(world.status(&id).await, MachineStatus::Running, "{mode}");
            world.clock.advance(Duration::from_secs(50));
            world.reaches(&id, MachineStatus::Paused).await;
            world.touch(&id).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_machine_is_looked_at_as_often_as_its_window_needs_and_not_more() {
    let machine = Metered::new(serde_json::json!({})).await;
    machine.pass(2 * LOOK_EVERY.as_secs(), 0, 0).await;
    machine.pass(1, 900, 0).await;
    assert!(
        machine
            .sources()
            .iter()
            .all(|source| *source != ActivitySource::Cpu),
        "no look was due"
    );
}
