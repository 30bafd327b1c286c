//! Random operations, faults, ends of leases, forks, kills of torpord and power cuts against an oracle of memory and disk.
//!
//! The oracle: a number in memory and a number on disk. The disk never goes back. Memory goes on without a gap,
//! unless an event says that it was rolled back, lost, given up or that the guest booted again.

use super::super::fleet::{ForkOrder, PolicyRule};
use super::super::leases;
use super::super::simulated::{Fault, Point};
use super::*;
use proptest::prelude::*;
use torpor_api::ErrorCode;
use torpor_api::http::ForkMachine;
use torpor_api::vmm::ExitReason;

#[derive(Debug, Clone, Copy)]
enum Step {
    Count,
    Write,
    Pause,
    Resume,
    PauseAndWake,
    Fail(Point, ErrorCode),
    Die(Point),
    KillVmm,
    KillTorpord,
    CutPower,
    Reboot,
    PowerOff,
    LeaseEnds,
    Fork,
}

fn step() -> impl Strategy<Value = Step> {
    let point = prop_oneof![
        Just(Point::Freeze),
        Just(Point::Persist),
        Just(Point::Persisted),
        Just(Point::Run),
        Just(Point::Restore)
    ];
    let code = prop_oneof![Just(ErrorCode::DiskFull), Just(ErrorCode::PauseFailed)];
    prop_oneof![
        6 => Just(Step::Count),
        2 => Just(Step::Write),
        6 => Just(Step::Pause),
        2 => Just(Step::Resume),
        4 => Just(Step::PauseAndWake),
        2 => (point.clone(), code).prop_map(|(point, code)| Step::Fail(point, code)),
        1 => point.prop_map(Step::Die),
        1 => Just(Step::KillVmm),
        2 => Just(Step::KillTorpord),
        1 => Just(Step::CutPower),
        1 => Just(Step::Reboot),
        1 => Just(Step::PowerOff),
        3 => Just(Step::LeaseEnds),
        2 => Just(Step::Fork),
    ]
}

const BREAKS: [&str; 6] = [
    "machine.memory_rolled_back",
    "machine.memory_lost",
    "machine.memory_given_up",
    "machine.rebooted",
    "machine.stopped",
    "machine.boot_failed",
];

struct Oracle {
    world: World,
    id: MachineId,
    counted: u64,
    written: u64,
    n_breaks: usize,
}

impl Oracle {
    async fn take(&mut self, step: Step) {
        match step {
            Step::Count => drop(self.check_memory().await),
            Step::Write => {
                if let Ok(written) = self.world.exec(&self.id, "write").await {
                    self.written += 1;
                    assert_eq!(written, self.written, "the disk went back");
                }
            }
            Step::Pause => drop(self.world.pause(&self.id).await),
            Step::Resume => drop(self.world.resume(&self.id).await),
            Step::PauseAndWake => {
                let (pause, wake) = tokio::join!(self.world.pause(&self.id), self.world.touch(&self.id));
                drop((pause, wake));
            }
            Step::Fail(point, code) => self.world.host.faults().at(point, Fault::Fail(code)),
            Step::Die(point) => self.world.host.faults().at(point, Fault::Die),
            Step::KillVmm => self.end(ExitReason::Failed {
                message: "killed".to_owned(),
            }),
            Step::Reboot => self.end(ExitReason::Reboot),
            Step::PowerOff => self.end(ExitReason::Shutdown),
            Step::KillTorpord => self.restart().await,
            Step::CutPower => {
                self.world.host.cut_power();
                self.restart().await;
            }
            Step::LeaseEnds => self.end_lease().await,
            Step::Fork => self.fork().await,
        }
    }

    async fn restart(&mut self) {
        self.world.restart().await;
        self.keep_time();
    }

    fn keep_time(&self) {
        tokio::spawn(leases::run(self.world.fleet.clone()));
    }

    /// A lease ends; what follows meets the pause at some point of it, or the machine asleep.
    async fn end_lease(&self) {
        let lease = serde_json::json!({ "seconds": 60, "action": "pause" });
        let lease = serde_json::from_value(lease).unwrap();
        let rule = PolicyRule::DestroyOrWake;
        drop(self.world.fleet.set_lease(&self.id, Some(lease), rule).await);
        self.world.clock.advance(Duration::from_secs(60));
        for _ in 0..self.counted % 40 {
            tokio::task::yield_now().await;
        }
    }

    async fn forked(&self) -> Result<MachineId, MachineError> {
        let order = ForkOrder {
            body: ForkMachine {
                count: 1,
                ..ForkMachine::default()
            },
            idempotency: None,
        };
        let forked = self.world.fleet.fork(&self.id, order).await?;
        Ok(forked.machines[0].id.clone())
    }

    /// A fork goes on at the machine's instant, and what it does is its own.
    async fn fork(&mut self) {
        if !self.check_memory().await {
            return;
        }
        let Ok(fork) = &self.forked().await else {
            return;
        };
        // Faults that were meant for the source may have met the fork.
        let is_whole =
            self.n_breaks().await == self.n_breaks && self.world.count(fork, "machine.started").await == 0;
        let counted = self.world.exec(fork, "count").await;
        if let (true, Ok(counted)) = (is_whole, counted) {
            assert_eq!(counted, self.counted + 1, "the fork is of another instant");
        }
        // A deletion that fails is taken up by the next torpord.
        drop(self.world.delete(fork).await);
    }

    fn end(&self, reason: ExitReason) {
        if let Some(execution) = self.world.host.live(&self.id).first() {
            execution.end(reason);
        }
    }

    async fn n_breaks(&self) -> usize {
        let events = self.world.events(&self.id).await;
        let breaks = events.iter().filter(|kind| BREAKS.contains(&kind.as_str()));
        breaks.count()
    }

    /// Whether the memory could be asked; it is what it has to be then.
    async fn check_memory(&mut self) -> bool {
        let n_before = self.n_breaks().await;
        let Ok(counted) = self.world.exec(&self.id, "count").await else {
            return false;
        };
        // What the count is judged by has to be written down; a view waits for that.
        self.world.view(&self.id).await;
        let n_after = self.n_breaks().await;
        let events = self.world.events(&self.id).await;
        if n_before == self.n_breaks && n_after == self.n_breaks {
            assert_eq!(
                counted,
                self.counted + 1,
                "memory changed, and nobody said so: {events:?}"
            );
        } else {
            assert!(counted <= self.counted + 1, "memory from nowhere: {events:?}");
        }
        // A lease may have ended meanwhile, and its pause have lost the memory that has just been asked.
        (self.counted, self.n_breaks) = (counted, n_before);
        n_before == n_after
    }
}

#[derive(Debug, Clone, Copy)]
enum Beginning {
    Running,
    Paused,
    Stopped,
    /// As a fork of another machine, which is gone.
    Forked,
}

impl Oracle {
    async fn at(beginning: Beginning) -> Self {
        let world = World::new();
        let id = world.create().await;
        let mut oracle = Self {
            world,
            id,
            counted: 0,
            written: 0,
            n_breaks: 0,
        };
        match beginning {
            Beginning::Running => {}
            Beginning::Paused => oracle.world.pause(&oracle.id).await.unwrap(),
            Beginning::Stopped => {
                oracle.end(ExitReason::Shutdown);
                oracle.world.reaches(&oracle.id, MachineStatus::Stopped).await;
            }
            Beginning::Forked => {
                let source = oracle.id.clone();
                oracle.id = oracle.forked().await.unwrap();
                oracle.world.delete(&source).await.unwrap();
            }
        }
        oracle.n_breaks = oracle.n_breaks().await;
        oracle.keep_time();
        oracle
    }

    async fn live(mut self, steps: Vec<Step>) {
        for step in steps {
            self.take(step).await;
        }
        let Self { world, id, .. } = &self;
        // Faults that nobody met yet would be met by the last wishes.
        world.host.faults().clear();
        for _ in 0..2 {
            // The first wake may still meet the end of a VMM that died before.
            let _ = world.touch(id).await;
        }
        world.touch(id).await.expect("a wake without a fault succeeds");
        self.check_memory().await;
        let Self { world, id, .. } = &self;
        assert_eq!(world.exec(id, "read").await, Ok(self.written));
        world.delete(id).await.unwrap();
        assert!(world.host.machines_with_files().is_empty());
        assert!(
            world.host.snapshots_on_disk().is_empty(),
            "a fork left its snapshot"
        );
    }
}

fn lives(beginning: Beginning, steps: Vec<Step>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async { Oracle::at(beginning).await.live(steps).await });
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(step(), 1..25)
}

// A thousand lives, in four tests that run beside each other.
proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_to_a_running_machine_nothing_is_lost_unsaid(steps in steps()) {
        lives(Beginning::Running, steps);
    }

    #[test]
    fn whatever_happens_to_a_paused_machine_nothing_is_lost_unsaid(steps in steps()) {
        lives(Beginning::Paused, steps);
    }

    #[test]
    fn whatever_happens_to_a_stopped_machine_nothing_is_lost_unsaid(steps in steps()) {
        lives(Beginning::Stopped, steps);
    }

    #[test]
    fn whatever_happens_to_a_fork_nothing_is_lost_unsaid(steps in steps()) {
        lives(Beginning::Forked, steps);
    }
}
