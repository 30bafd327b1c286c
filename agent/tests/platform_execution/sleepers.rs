//! Machines that keep their VMM while they sleep.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use torpor_agent::execution::Platform;
use torpor_agent::machine::hypervisor::{Execution, Hypervisor as _, MachineSpec, SleeperLimits, WokenFrom};
use torpor_api::vmm::VmmState;
use torpor_api::{ErrorCode, ExecutionId};

use super::host::{Host, on_a_host};
use super::{boot, code, kill, until, until_killed};

/// Put a machine to sleep as `generation`; whether its VMM stays.
async fn pause(execution: &Arc<dyn Execution>, generation: u64) -> bool {
    execution.freeze().await.unwrap();
    execution.persist(generation).await.unwrap();
    Arc::clone(execution).stay()
}

/// A new machine that was booted and put to sleep as generation 1, and stays.
async fn asleep(host: &Host, platform: &Platform) -> (MachineSpec, Arc<dyn Execution>) {
    let machine = host.machine(platform).await;
    let execution = boot(platform, &machine).await.unwrap();
    assert!(pause(&execution, 1).await);
    (machine, execution)
}

async fn restore(
    platform: &Platform,
    machine: &MachineSpec,
    generation: u64,
) -> (Arc<dyn Execution>, WokenFrom) {
    let id = ExecutionId::generate();
    let (execution, stages) = platform.restore(machine, &id, generation, None).await.unwrap();
    assert_eq!(execution.id(), &id);
    (execution, stages.from)
}

fn dirs_of(executions: &[&Arc<dyn Execution>]) -> BTreeSet<String> {
    executions
        .iter()
        .map(|execution| execution.id().to_string())
        .collect()
}

async fn start(host: &mut Host) -> Arc<Platform> {
    host.sleepers = SleeperLimits {
        resident_mem_mib: 512,
        resident_for: Duration::from_secs(300),
        dozing: 0,
    };
    host.start("well").await
}

/// Run directories of executions, blank VMMs apart.
fn named(host: &Host) -> BTreeSet<String> {
    host.run_dirs()
        .into_iter()
        .filter(|name| !name.starts_with("blank-"))
        .collect()
}

#[test]
fn a_machine_goes_on_in_its_old_vmm_as_a_new_execution() {
    on_a_host(async |host| {
        let platform = start(host).await;
        let machine = host.machine(&platform).await;
        let first = boot(&platform, &machine).await.unwrap();
        let process = host.record(first.id().as_str()).process;
        assert!(pause(&first, 1).await);

        let (second, from) = restore(&platform, &machine, 1).await;
        assert_eq!(from, WokenFrom::Resident);
        assert_eq!(named(host), dirs_of(&[&second]), "the directory has the new name");
        assert_eq!(host.record(second.id().as_str()).process, process);
        assert_eq!(second.status().await.unwrap().state, VmmState::Running);

        assert!(pause(&second, 2).await);
        let (third, from) = restore(&platform, &machine, 2).await;
        assert_eq!(from, WokenFrom::Resident);
        assert!(pause(&third, 3).await);
        // Another generation than the one it stands at: neither this VMM nor the image will do.
        let refused = platform
            .restore(&machine, &ExecutionId::generate(), 7, None)
            .await;
        assert_eq!(code(refused), ErrorCode::ImageCorrupt);
        assert_eq!(named(host), BTreeSet::new());
        let (fourth, from) = restore(&platform, &machine, 3).await;
        assert_eq!(from, WokenFrom::Image);
        fourth.quit().await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn the_oldest_makes_room_and_none_outlives_a_stop_or_its_files() {
    on_a_host(async |host| {
        let platform = start(host).await;
        let mut machines = Vec::new();
        for _ in 0..3 {
            machines.push(asleep(host, &platform).await);
        }
        let [(_, first), (second, _), (third, third_execution)] = &machines[..] else {
            unreachable!("three were made")
        };
        until(|| !named(host).contains(first.id().as_str())).await;
        assert_eq!(named(host).len(), 2);
        platform.delete_files(&second.id).await.unwrap();
        assert_eq!(named(host), dirs_of(&[third_execution]));
        // A boot gives the memory up.
        let booted = boot(&platform, third).await.unwrap();
        assert_eq!(named(host), dirs_of(&[&booted]));
        assert!(pause(&booted, 2).await);
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn one_that_does_not_fit_does_not_stay_and_one_that_dies_is_restored() {
    on_a_host(async |host| {
        let platform = start(host).await;
        let machine = host.machine(&platform).await;
        let large = MachineSpec {
            mem_mib: 1024,
            ..host.machine(&platform).await
        };
        let execution = boot(&platform, &large).await.unwrap();
        assert!(!pause(&execution, 1).await);
        execution.quit().await;

        let execution = boot(&platform, &machine).await.unwrap();
        let record = host.record(execution.id().as_str());
        assert!(pause(&execution, 1).await);
        kill(&record);
        let (restored, from) = restore(&platform, &machine, 1).await;
        assert_eq!(from, WokenFrom::Image);
        restored.quit().await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

async fn until_dozing(execution: &Arc<dyn Execution>) {
    while execution.status().await.unwrap().state != VmmState::Dozing {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_machine_that_dozes_goes_on_from_there_and_can_doze_again() {
    on_a_host(async |host| {
        host.sleepers.dozing = 1;
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        let mut execution = boot(&platform, &machine).await.unwrap();
        let process = host.record(execution.id().as_str()).process;
        for generation in 1..=3 {
            assert!(pause(&execution, generation).await);
            until_dozing(&execution).await;
            let (woken, from) = restore(&platform, &machine, generation).await;
            assert_eq!(from, WokenFrom::Dozing);
            assert_eq!(host.record(woken.id().as_str()).process, process);
            execution = woken;
        }
        // At once after the pause: whether it dozes by then or not, it wakes.
        assert!(pause(&execution, 4).await);
        let (woken, _) = restore(&platform, &machine, 4).await;
        assert_eq!(woken.status().await.unwrap().state, VmmState::Running);
        woken.quit().await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn what_is_resident_no_longer_dozes_and_past_that_limit_the_oldest_ends() {
    on_a_host(async |host| {
        host.sleepers = SleeperLimits {
            resident_mem_mib: 256,
            resident_for: Duration::from_secs(300),
            dozing: 1,
        };
        let platform = host.start("well").await;
        let mut machines = Vec::new();
        for _ in 0..3 {
            machines.push(asleep(host, &platform).await);
        }
        let [(first, gone), (second, dozing), (third, resident)] = &machines[..] else {
            unreachable!("three were made")
        };
        until(|| !named(host).contains(gone.id().as_str())).await;
        until_dozing(dozing).await;
        assert_eq!(named(host), dirs_of(&[dozing, resident]));
        let counts = platform.pools().sleepers;
        assert_eq!(
            (counts.resident, counts.resident_mem_mib, counts.dozing),
            (1, 256, 1)
        );
        for (machine, wanted) in [
            (first, WokenFrom::Image),
            (second, WokenFrom::Dozing),
            (third, WokenFrom::Resident),
        ] {
            let (woken, from) = restore(&platform, machine, 1).await;
            assert_eq!(from, wanted);
            woken.quit().await;
        }
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn a_resident_machine_dozes_when_its_time_is_over() {
    on_a_host(async |host| {
        host.sleepers = SleeperLimits {
            resident_mem_mib: 256,
            resident_for: Duration::from_millis(200),
            dozing: 1,
        };
        let platform = host.start("well").await;
        let (_, execution) = asleep(host, &platform).await;
        assert_eq!(execution.status().await.unwrap().state, VmmState::Durable);
        until_dozing(&execution).await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn one_whose_memory_was_evicted_is_restored_and_one_of_a_killed_torpord_ended() {
    on_a_host(async |host| {
        host.sleepers.dozing = 1;
        let (machine, process) = until_killed(async || {
            let platform = host.start("evicted").await;
            let (machine, execution) = asleep(host, &platform).await;
            until_dozing(&execution).await;
            let (restored, from) = restore(&platform, &machine, 1).await;
            assert_eq!(from, WokenFrom::Image);
            assert_eq!(named(host), dirs_of(&[&restored]));
            assert!(pause(&restored, 2).await);
            until_dozing(&restored).await;
            let process = host.record(restored.id().as_str()).process;
            std::mem::forget((platform, execution, restored));
            (machine, process)
        });
        let platform = host.start("well").await;
        assert!(platform.adopt().await.is_empty());
        assert_eq!(named(host), BTreeSet::new());
        let (restored, from) = restore(&platform, &machine, 2).await;
        assert_eq!(from, WokenFrom::Image);
        assert_ne!(host.record(restored.id().as_str()).process, process);
        restored.quit().await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}
