//! Random operations, faults, kills of torpord and power cuts against an oracle of memory and disk.
//!
//! The oracle: a number in memory and a number on disk. The disk never goes back. Memory goes on without a gap,
//! unless an event says that it was rolled back, lost, given up or that the guest booted again.

use super::super::simulated::{Fault, Point};
use super::*;
use proptest::prelude::*;
use torpor_api::ErrorCode;
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
            Step::Count => self.check_memory().await,
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
            Step::KillTorpord => self.world.restart().await,
            Step::CutPower => {
                self.world.host.cut_power();
                self.world.restart().await;
            }
        }
    }

    fn end(&self, reason: ExitReason) {
        if let Some(execution) = self.world.host.live(&self.id).first() {
            execution.end(reason);
        }
    }

    async fn check_memory(&mut self) {
        let Ok(counted) = self.world.exec(&self.id, "count").await else {
            return;
        };
        // What the count is judged by has to be written down; a view waits for that.
        self.world.view(&self.id).await;
        let events = self.world.events(&self.id).await;
        let n_breaks = events
            .iter()
            .filter(|kind| BREAKS.contains(&kind.as_str()))
            .count();
        if n_breaks == self.n_breaks {
            assert_eq!(
                counted,
                self.counted + 1,
                "memory changed, and nobody said so: {events:?}"
            );
        } else {
            assert!(counted <= self.counted + 1, "memory from nowhere: {events:?}");
        }
        (self.counted, self.n_breaks) = (counted, n_breaks);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_happens_nothing_is_lost_unsaid(steps in proptest::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let world = World::new();
            let id = world.create().await;
            let mut oracle = Oracle { world, id, counted: 0, written: 0, n_breaks: 0 };
            for step in steps {
                oracle.take(step).await;
            }
            // Faults that nobody met yet would be met by the last wishes.
            oracle.world.host.faults().clear();
            for _ in 0..2 {
                // The first wake may still meet the end of a VMM that died before.
                let _ = oracle.world.touch(&oracle.id).await;
            }
            oracle.world.touch(&oracle.id).await.expect("a wake without a fault succeeds");
            oracle.check_memory().await;
            assert_eq!(oracle.world.exec(&oracle.id, "read").await, Ok(oracle.written));
            oracle.world.delete(&oracle.id).await.unwrap();
            assert!(oracle.world.host.machines_with_files().is_empty());
        });
    }
}
