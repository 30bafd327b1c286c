//! Requests at every instant of the lifecycle: leases end, pauses are ordered, snapshots taken, torpord replaced, and nobody
//! who asks for the machine notices more than that it takes a moment.

use super::super::fleet::SnapshotOrder;
use super::super::hypervisor::Execution as _;
use super::super::leases;
use super::*;
use rand::Rng;
use tokio::sync::RwLock;
use tokio::time::sleep;

const N_CLIENTS: u64 = 20;
const N_REQUESTS: u64 = 10_000;
const N_RESTARTS: u64 = 10;

/// A host whose torpord is now and then replaced. Whoever is inside a torpord keeps it; who comes meanwhile waits for
/// the next one, as connections do in the kernel.
#[derive(Clone)]
struct Site(Arc<RwLock<World>>, MachineId);

impl Site {
    async fn new() -> Self {
        // Whoever is inside is waited for, however busy this host is; who outlasts the patience is another test's matter.
        let world = World::with(Settings {
            drain_grace: Duration::from_secs(60),
            ..Settings::default()
        });
        let lease = serde_json::json!({ "seconds": 2, "action": "pause" });
        let id = world
            .create_from(serde_json::json!({ "lease": lease }))
            .await
            .unwrap();
        tokio::spawn(leases::run(world.fleet.clone()));
        Self(Arc::new(RwLock::new(world)), id)
    }

    /// A command that must run exactly once, or traffic that must find the machine running.
    async fn request(&self, is_command: bool) {
        let world = self.0.read().await;
        if is_command {
            world.exec(&self.1, "count").await.unwrap();
            return;
        }
        let woken = world
            .fleet
            .wake(&self.1, WakeSource::Http, serde_json::Value::Null);
        let woken = woken.await.unwrap();
        let inside = woken.pass.epoch().execution.id();
        for _ in 0..4 {
            let live = world.host.live(&self.1);
            assert_eq!(live.len(), 1);
            assert_eq!(live[0].id(), inside, "a pause waits for who is inside");
            tokio::task::yield_now().await;
        }
        drop(woken);
    }

    /// What happens to the machine meanwhile, without a regard for who uses it.
    async fn disturb(&self) {
        loop {
            let (fleet, clock) = {
                let world = self.0.read().await;
                (world.fleet.clone(), Arc::clone(&world.clock))
            };
            match chance(8) {
                0 => drop(fleet.snapshot(&self.1, SnapshotOrder::default()).await),
                1..4 => clock.advance(Duration::from_secs(1)),
                _ => drop(fleet.pause(&self.1, PauseOrder::by("api")).await),
            }
            sleep(Duration::from_micros(chance(2000))).await;
        }
    }

    /// Kill torpord, whatever it is in the middle of, and start the next one.
    async fn replace(&self) {
        let mut world = self.0.write().await;
        world.restart().await;
        tokio::spawn(leases::run(world.fleet.clone()));
    }
}

fn chance(n: u64) -> u64 {
    rand::rng().random_range(0..n)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_requests_at_any_instant_meet_no_error_and_every_sleep_ends_in_one_restore() {
    let site = Site::new().await;
    let clients: Vec<_> = (0..N_CLIENTS)
        .map(|_| {
            let site = site.clone();
            tokio::spawn(async move {
                let mut n_commands = 0;
                for _ in 0..N_REQUESTS / N_CLIENTS {
                    let is_command = chance(4) == 0;
                    n_commands += u64::from(is_command);
                    site.request(is_command).await;
                    sleep(Duration::from_micros(chance(4000))).await;
                }
                n_commands
            })
        })
        .collect();
    let disturbing = tokio::spawn({
        let site = site.clone();
        async move { site.disturb().await }
    });
    for _ in 0..N_RESTARTS {
        sleep(Duration::from_millis(100)).await;
        site.replace().await;
    }
    let mut n_commands = 0;
    for client in clients {
        n_commands += client.await.unwrap();
    }
    disturbing.abort();
    let world = site.0.read().await;
    let counted = world.exec(&site.1, "count").await;
    assert_eq!(counted, Ok(n_commands + 1), "a command was lost or run twice");
    let machine = world.view(&site.1).await;
    assert_eq!(machine.wakes, world.host.n_restores());
    assert!(machine.wakes <= machine.pauses, "{machine:?}");
    let n_cancelled = world.count(&site.1, "machine.pause_cancelled").await;
    assert!(
        machine.pauses > 20 && n_cancelled > 20,
        "{} pauses and {n_cancelled} cancelled ones try nothing",
        machine.pauses
    );
}
