//! Machines that keep their VMM while they sleep.

use std::collections::BTreeSet;
use std::sync::Arc;

use torpor_agent::execution::Platform;
use torpor_agent::machine::hypervisor::{Execution, Hypervisor as _, MachineSpec};
use torpor_api::vmm::VmmState;
use torpor_api::{ErrorCode, ExecutionId};

use super::host::{Host, on_a_host};
use super::{boot, code, kill, until};

/// Put a machine to sleep as `generation`; whether its VMM stays.
async fn pause(execution: &Arc<dyn Execution>, generation: u64) -> bool {
    execution.freeze().await.unwrap();
    execution.persist(generation).await.unwrap();
    Arc::clone(execution).stay()
}

async fn restore(platform: &Platform, machine: &MachineSpec, generation: u64) -> (Arc<dyn Execution>, bool) {
    let id = ExecutionId::generate();
    let (execution, stages) = platform.restore(machine, &id, generation, None).await.unwrap();
    assert_eq!(execution.id(), &id);
    (execution, stages.is_resident)
}

fn dirs_of(executions: &[&Arc<dyn Execution>]) -> BTreeSet<String> {
    executions
        .iter()
        .map(|execution| execution.id().to_string())
        .collect()
}

async fn start(host: &mut Host) -> Arc<Platform> {
    host.resident_mem_mib = 512;
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

        let (second, is_resident) = restore(&platform, &machine, 1).await;
        assert!(is_resident);
        assert_eq!(named(host), dirs_of(&[&second]), "the directory has the new name");
        assert_eq!(host.record(second.id().as_str()).process, process);
        assert_eq!(second.status().await.unwrap().state, VmmState::Running);

        assert!(pause(&second, 2).await);
        let (third, is_resident) = restore(&platform, &machine, 2).await;
        assert!(is_resident);
        assert!(pause(&third, 3).await);
        // Another generation than the one it stands at: neither this VMM nor the image will do.
        let refused = platform
            .restore(&machine, &ExecutionId::generate(), 7, None)
            .await;
        assert_eq!(code(refused), ErrorCode::ImageCorrupt);
        assert_eq!(named(host), BTreeSet::new());
        let (fourth, is_resident) = restore(&platform, &machine, 3).await;
        assert!(!is_resident);
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
            let machine = host.machine(&platform).await;
            let execution = boot(&platform, &machine).await.unwrap();
            assert!(pause(&execution, 1).await);
            machines.push((machine, execution));
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
        let (restored, is_resident) = restore(&platform, &machine, 1).await;
        assert!(!is_resident);
        restored.quit().await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}
