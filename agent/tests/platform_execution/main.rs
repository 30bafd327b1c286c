//! The platform with a VMM that needs no KVM: starts, pools, persists, ends and take-overs, with real processes,
//! sockets and network namespaces. Needs root and `nft`; every test has a network and a mount namespace of its own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "../shared/command.rs"]
mod command;
mod fake_vmm;
mod host;
#[path = "../shared/killed.rs"]
mod killed;
#[path = "../shared/own_host.rs"]
mod own_host;
mod sleepers;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use command::run_to_end;
use host::on_a_host;
use killed::until_killed;
use torpor_agent::execution::Platform;
use torpor_agent::execution::record::Record;
use torpor_agent::guest_client::{GuestClient, GuestClientError};
use torpor_agent::machine::hypervisor::{
    Execution, Hypervisor as _, HypervisorError, ImageState, MachineSpec,
};
use torpor_api::guest::ExecSpec;
use torpor_api::vmm::{ExitReason, VmmState};
use torpor_api::{ErrorCode, ExecutionId};

async fn boot(platform: &Platform, machine: &MachineSpec) -> Result<Arc<dyn Execution>, HypervisorError> {
    platform.boot(machine, &ExecutionId::generate()).await
}

fn code<T>(result: Result<T, HypervisorError>) -> ErrorCode {
    result.err().expect("it should have failed").code
}

/// Wait until `holds`; the test's own limit bounds it.
async fn until(holds: impl Fn() -> bool) {
    while !holds() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Put a machine to sleep as `generation` and end its VMM.
async fn sleep_as(execution: &dyn Execution, generation: u64) {
    execution.freeze().await.unwrap();
    assert_eq!(
        execution.persist(generation).await.unwrap().generation,
        generation
    );
    execution.quit().await;
}

fn argv(words: &[&str]) -> ExecSpec {
    ExecSpec {
        argv: words.iter().map(|word| (*word).to_owned()).collect(),
        timeout_ms: Some(60_000),
        ..ExecSpec::default()
    }
}

#[test]
fn a_machine_boots_runs_commands_sleeps_and_wakes_as_a_new_execution() {
    on_a_host(async |host| {
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        assert_eq!(platform.inspect_image(&machine.id).await, ImageState::None);
        let execution = boot(&platform, &machine).await.unwrap();
        let ran = run_to_end(&execution.guest(), argv(&["echo", "hi"]))
            .await
            .unwrap();
        assert_eq!(ran, (Some(3), b"echo hi".to_vec(), Vec::new()));
        let missing = run_to_end(&execution.guest(), argv(&["no such program"])).await;
        assert!(
            matches!(missing, Err(GuestClientError::Refused { .. })),
            "{missing:?}"
        );
        sleep_as(&*execution, 1).await;
        assert_eq!(
            platform.inspect_image(&machine.id).await,
            ImageState::Valid { generation: 1 }
        );

        let name = ExecutionId::generate();
        let (awake, stages) = platform.restore(&machine, &name, 1, None).await.unwrap();
        println!("{stages:?}");
        assert_eq!(awake.id(), &name);
        assert!(stages.vmm_ready_us <= stages.restored_us && stages.restored_us <= stages.resynced_us);
        assert_eq!(stages.vmm.running_us, 3);
        assert_eq!(awake.status().await.unwrap().state, VmmState::Running);
        awake.first_byte().await;
        sleep_as(&*awake, 2).await;
        awake.quit().await;
        assert_eq!(
            platform.inspect_image(&machine.id).await,
            ImageState::Valid { generation: 2 }
        );
        platform.delete_files(&machine.id).await.unwrap();
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn a_boot_gives_up_the_old_memory_before_anything_runs() {
    on_a_host(async |host| {
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        sleep_as(&*boot(&platform, &machine).await.unwrap(), 1).await;
        let execution = boot(&platform, &machine).await.unwrap();
        assert_eq!(platform.inspect_image(&machine.id).await, ImageState::None);
        execution.quit().await;
        platform.stop().await;
    });
}

#[test]
fn a_guest_whose_agent_comes_up_late_is_waited_for() {
    on_a_host(async |host| {
        let platform = host.start("slow_guest").await;
        let machine = host.machine(&platform).await;
        boot(&platform, &machine).await.unwrap().quit().await;
        platform.stop().await;
    });
}

#[test]
fn a_guest_that_never_answers_fails_the_boot_and_leaves_nothing() {
    on_a_host(async |host| {
        let platform = host.start("silent_guest").await;
        let machine = host.machine(&platform).await;
        assert_eq!(code(boot(&platform, &machine).await), ErrorCode::BootFailed);
        until(|| !host.run_dirs().iter().any(|name| name.starts_with("exe_"))).await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn a_boot_that_is_dropped_leaves_nothing() {
    on_a_host(async |host| {
        let platform = host.start("silent_guest").await;
        let machine = host.machine(&platform).await;
        {
            let booting = boot(&platform, &machine);
            let named = until(|| host.run_dirs().iter().any(|name| name.starts_with("exe_")));
            tokio::select! {
                outcome = booting => panic!("the boot ended: {:?}", outcome.err()),
                () = named => {}
            }
        }
        until(|| !host.run_dirs().iter().any(|name| name.starts_with("exe_"))).await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn the_first_start_after_a_restart_finds_a_blank_vmm_of_a_shape_used_before() {
    on_a_host(async |host| {
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        boot(&platform, &machine).await.unwrap().quit().await;
        platform.stop().await;
        drop(platform);
        until(|| host.path("state/shapes-in-use.json").exists()).await;
        let platform = host.start("well").await;
        platform.blanks_settled().await;
        let blank = host
            .run_dirs()
            .into_iter()
            .find(|name| name.starts_with("blank-"))
            .unwrap();
        let waiting = host.record(&blank).process;
        let execution = boot(&platform, &machine).await.unwrap();
        assert_eq!(host.record(execution.id().as_str()).process, waiting);
        execution.quit().await;
        platform.stop().await;
    });
}

#[test]
fn a_start_waits_until_the_machines_earlier_vmm_has_closed_its_disk() {
    on_a_host(async |host| {
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        let first = boot(&platform, &machine).await.unwrap();
        let pid = host.record(first.id().as_str()).process.pid;
        let second = boot(&platform, &machine);
        tokio::pin!(second);
        let early = tokio::time::timeout(Duration::from_millis(300), &mut second).await;
        assert!(early.is_err(), "two VMMs have one disk");
        kill(&host.record(first.id().as_str()));
        let second = second.await.unwrap();
        assert!(fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z ")));
        first.quit().await;
        second.quit().await;
        platform.stop().await;
    });
}

#[test]
fn a_vmm_that_dies_at_once_is_a_lack_of_capacity() {
    on_a_host(async |host| {
        let platform = host.start("dies_at_prepare").await;
        let machine = host.machine(&platform).await;
        assert_eq!(code(boot(&platform, &machine).await), ErrorCode::CapacityExceeded);
        platform.stop().await;
        // A slot that was being made when the VMM died is taken down when it is there.
        let is_clean = async || {
            while (host.run_dirs(), host.netns()) != (BTreeSet::new(), 0) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), is_clean())
            .await
            .unwrap();
    });
}

#[test]
fn with_every_slot_taken_a_start_says_so_and_a_freed_slot_serves_the_next() {
    on_a_host(async |host| {
        host.max_slots = 1;
        let platform = host.start("well").await;
        let (first, second) = (host.machine(&platform).await, host.machine(&platform).await);
        let execution = boot(&platform, &first).await.unwrap();
        assert_eq!(code(boot(&platform, &second).await), ErrorCode::CapacityExceeded);
        execution.quit().await;
        boot(&platform, &second).await.unwrap().quit().await;
        platform.stop().await;
    });
}

#[test]
fn a_start_takes_the_blank_vmm_of_its_shape_and_the_pool_is_filled_again() {
    on_a_host(async |host| {
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        let first = boot(&platform, &machine).await.unwrap();
        first.quit().await;
        platform.blanks_settled().await;
        let blank = host
            .run_dirs()
            .into_iter()
            .find(|name| name.starts_with("blank-"))
            .unwrap();
        let waiting = host.record(&blank).process;
        let second = boot(&platform, &machine).await.unwrap();
        assert_eq!(host.record(second.id().as_str()).process, waiting);
        platform.blanks_settled().await;
        platform.slots().settled().await;
        let pools = platform.pools();
        let [of_shape] = &pools.blank_vmms[..] else {
            panic!("one shape was used: {pools:?}")
        };
        assert_eq!((of_shape.vcpus, of_shape.mem_mib), (1, 256));
        assert_eq!((of_shape.ready, of_shape.wanted), (1, 1));
        let slots = &pools.slots;
        assert_eq!((slots.ready, slots.wanted), (1, 1));
        assert_eq!((slots.parked, slots.free, slots.most), (0, 6, 8));

        // A blank VMM that died in the pool is passed over.
        let blank = host
            .run_dirs()
            .into_iter()
            .find(|name| name.starts_with("blank-"))
            .unwrap();
        let dead = host.record(&blank);
        kill(&dead);
        until(|| !Path::new(&format!("/proc/{}", dead.process.pid)).exists()).await;
        second.quit().await;
        boot(&platform, &machine).await.unwrap().quit().await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

fn kill(record: &Record) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(record.process.pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn a_persist_that_fails_says_why_and_the_guest_runs() {
    on_a_host(async |host| {
        let platform = host.start("persist_fails").await;
        let machine = host.machine(&platform).await;
        let execution = boot(&platform, &machine).await.unwrap();
        execution.freeze().await.unwrap();
        assert_eq!(code(execution.persist(1).await), ErrorCode::DiskFull);
        assert_eq!(execution.status().await.unwrap().state, VmmState::Running);
        assert_eq!(platform.inspect_image(&machine.id).await, ImageState::None);
        execution.quit().await;
        platform.stop().await;
    });
}

#[test]
fn a_run_ends_a_persist_under_way_and_a_later_one_succeeds_on_its_own() {
    on_a_host(async |host| {
        let platform = host.start("persist_hangs").await;
        let machine = host.machine(&platform).await;
        let execution = boot(&platform, &machine).await.unwrap();
        for _ in 0..3 {
            execution.freeze().await.unwrap();
            let wake = async {
                while execution.status().await.unwrap().state != VmmState::Persisting {}
                execution.run().await.unwrap()
            };
            let (persisted, ran) = tokio::join!(execution.persist(1), wake);
            assert!(ran.persist_cancelled);
            assert_eq!(code(persisted), ErrorCode::PauseFailed);
        }
        assert!(
            !execution.run().await.unwrap().persist_cancelled,
            "it runs already"
        );
        execution.quit().await;
        platform.stop().await;
    });
}

#[test]
fn a_restore_of_another_generation_or_template_is_refused_and_harms_nothing() {
    on_a_host(async |host| {
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        sleep_as(&*boot(&platform, &machine).await.unwrap(), 5).await;
        let wake = async |machine: &MachineSpec, generation| {
            code(
                platform
                    .restore(machine, &ExecutionId::generate(), generation, None)
                    .await,
            )
        };
        assert_eq!(wake(&machine, 4).await, ErrorCode::ImageCorrupt);
        let bigger = MachineSpec {
            mem_mib: 512,
            ..machine.clone()
        };
        assert_eq!(wake(&bigger, 5).await, ErrorCode::ImageIncompatible);
        let other = MachineSpec {
            template_digest: "other".to_owned(),
            ..machine.clone()
        };
        assert_eq!(wake(&other, 5).await, ErrorCode::ImageIncompatible);
        let none = MachineSpec {
            template: "none".to_owned(),
            ..machine.clone()
        };
        assert_eq!(wake(&none, 5).await, ErrorCode::TemplateNotFound);
        assert_eq!(
            platform.inspect_image(&machine.id).await,
            ImageState::Valid { generation: 5 }
        );
        let (awake, _) = platform
            .restore(&machine, &ExecutionId::generate(), 5, None)
            .await
            .unwrap();
        awake.quit().await;
        platform.stop().await;

        let platform = host.start("refuses_image").await;
        let refused = platform
            .restore(&machine, &ExecutionId::generate(), 5, None)
            .await;
        assert_eq!(code(refused), ErrorCode::ImageCorrupt);
        assert_eq!(
            platform.inspect_image(&machine.id).await,
            ImageState::Valid { generation: 5 }
        );
        platform.stop().await;
    });
}

#[test]
fn the_end_of_a_guest_and_the_death_of_a_vmm_are_told_apart() {
    on_a_host(async |host| {
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        let execution = boot(&platform, &machine).await.unwrap();
        let mut exited = execution.exited();
        let guest = GuestClient::new(
            &host
                .path("run/exec")
                .join(execution.id().as_str())
                .join("vsock.sock"),
        );
        assert!(
            guest.shutdown(false).await.is_err(),
            "the guest is gone before it can answer"
        );
        assert_eq!(
            exited.wait_for(Option::is_some).await.unwrap().clone(),
            Some(ExitReason::Shutdown)
        );
        execution.quit().await;

        let execution = boot(&platform, &machine).await.unwrap();
        let mut exited = execution.exited();
        kill(&host.record(execution.id().as_str()));
        let reason = exited.wait_for(Option::is_some).await.unwrap().clone();
        assert!(matches!(reason, Some(ExitReason::Failed { .. })), "{reason:?}");
        assert!(execution.freeze().await.is_err());
        execution.quit().await;
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn a_restarted_torpord_takes_running_machines_over_and_ends_blank_vmms() {
    on_a_host(async |host| {
        let (machine, name) = until_killed(async || {
            let platform = host.start("well").await;
            let machine = host.machine(&platform).await;
            let execution = boot(&platform, &machine).await.unwrap();
            platform.blanks_settled().await;
            platform.slots().settled().await;
            let name = execution.id().clone();
            std::mem::forget((platform, execution));
            (machine, name)
        });
        let before = host.record(name.as_str());
        assert_eq!(host.run_dirs().len(), 2);

        let platform = host.start("well").await;
        assert_eq!(host.run_dirs(), BTreeSet::from([name.to_string()]));
        let mut adopted = platform.adopt().await;
        let adopted = adopted.pop().unwrap();
        assert_eq!(
            (&adopted.machine, adopted.state),
            (&machine.id, VmmState::Running)
        );
        assert_eq!(host.record(name.as_str()), before);
        let ran = run_to_end(&adopted.execution.guest(), argv(&["x"]))
            .await
            .unwrap();
        assert_eq!(ran.1, b"x");
        sleep_as(&*adopted.execution, 1).await;
        assert_eq!(
            platform.inspect_image(&machine.id).await,
            ImageState::Valid { generation: 1 }
        );
        assert!(platform.adopt().await.is_empty());
        platform.stop().await;
        assert_eq!((host.run_dirs(), host.netns()), (BTreeSet::new(), 0));
    });
}

#[test]
fn an_image_that_became_durable_while_torpord_was_away_gets_its_manifest() {
    on_a_host(async |host| {
        let machine = until_killed(async || {
            let platform = host.start("persist_unheard").await;
            let machine = host.machine(&platform).await;
            let execution = boot(&platform, &machine).await.unwrap();
            execution.freeze().await.unwrap();
            let durable = async { while execution.status().await.unwrap().state != VmmState::Durable {} };
            tokio::select! {
                persisted = execution.persist(1) => panic!("nobody told it: {persisted:?}"),
                () = durable => {}
            }
            assert_eq!(platform.inspect_image(&machine.id).await, ImageState::None);
            std::mem::forget((platform, execution));
            machine
        });

        let platform = host.start("well").await;
        let adopted = platform.adopt().await.pop().unwrap();
        assert_eq!(adopted.state, VmmState::Durable);
        assert_eq!(
            platform.inspect_image(&machine.id).await,
            ImageState::Valid { generation: 1 }
        );
        adopted.execution.quit().await;
        platform.stop().await;
    });
}

#[test]
fn what_earlier_runs_left_is_removed_and_strangers_with_a_reused_pid_are_left_alone() {
    on_a_host(async |host| {
        let platform = host.start("well").await;
        let machine = host.machine(&platform).await;
        let execution = boot(&platform, &machine).await.unwrap();
        let record = host.record(execution.id().as_str());
        execution.quit().await;
        platform.stop().await;

        let leave = |name: &str, record: Option<&Record>| {
            let dir = host.path("run/exec").join(name);
            fs::create_dir_all(&dir).unwrap();
            if let Some(record) = record {
                fs::write(dir.join("execution.json"), serde_json::to_vec(record).unwrap()).unwrap();
            }
        };
        leave("blank-half-made", None);
        leave("exe_dead", Some(&record));
        // This very process has the recorded PID, but was started at another time.
        let mut stranger = record.clone();
        stranger.process.pid = std::process::id();
        leave("exe_reused", Some(&stranger));
        fs::write(host.path("run/exec/exe_dead/extra"), b"x").unwrap();

        let platform = host.start("well").await;
        assert_eq!(host.run_dirs(), BTreeSet::new());
        assert!(platform.adopt().await.is_empty());
        platform.stop().await;
    });
}
