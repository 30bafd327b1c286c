//! The platform with the real VMM, kernel and guest: runs in the virtual host, where `torpor-vmm` and the template
//! `base` are installed. It has a network and a mount namespace of its own, so that an installed torpord does not
//! mind. `TORPOR_TEST_VMM` and `TORPOR_TEST_TEMPLATES` name others than the installed ones.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "../shared/killed.rs"]
mod killed;
#[path = "../shared/own_host.rs"]
mod own_host;

mod kvm {
    use std::net::Ipv4Addr;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use super::killed::until_killed;
    use super::own_host::{in_namespaces, runtime};
    use tokio::io::AsyncReadExt as _;
    use torpor_agent::execution::{BlankConfig, Platform};
    use torpor_agent::guest_client::channel::last_frame;
    use torpor_agent::machine::hypervisor::{
        ConnectError, Execution, Hypervisor as _, ImageState, MachineSpec, PlatformConfig, SleeperLimits,
    };
    use torpor_agent::net::NetConfig;
    use torpor_api::guest::{ExecSpec, FrameType, GuestResponse};
    use torpor_api::vmm::VmmState;
    use torpor_api::{ExecutionId, MachineId};

    const PORT: u16 = 8080;
    /// Counts its clients, in memory.
    const COUNTER: &str = "
import socket
server = socket.create_server(('', 8080))
n = 0
while True:
    client, _ = server.accept()
    n += 1
    client.sendall(str(n).encode())
    client.close()
";

    fn on_a_host(test: impl AsyncFnOnce(&Path) + Send + 'static) {
        in_namespaces(move || {
            let dir = tempfile::tempdir_in("/var/tmp").unwrap();
            runtime().block_on(test(dir.path()));
        });
    }

    fn installed(variable: &str, default: &str) -> PathBuf {
        std::env::var_os(variable).map_or_else(|| PathBuf::from(default), PathBuf::from)
    }

    async fn start(dir: &Path) -> Arc<Platform> {
        let config = PlatformConfig {
            state_dir: dir.join("state"),
            run_dir: dir.join("run"),
            template_dirs: vec![installed("TORPOR_TEST_TEMPLATES", "/usr/share/torpor/templates")],
            vmm_path: installed("TORPOR_TEST_VMM", "/usr/libexec/torpor/torpor-vmm"),
            boot_timeout: Duration::from_secs(180),
            console_limit_bytes: 1 << 20,
            max_parked: 4,
            blank_vmms: 1,
            sleepers: SleeperLimits::default(),
            max_slots: 8,
        };
        let net = NetConfig {
            netns_dir: dir.join("netns"),
            max_slots: 8,
            spares: 1,
            nameserver: Ipv4Addr::new(192, 0, 2, 53),
        };
        Platform::start_with(config, net, BlankConfig::default())
            .await
            .unwrap()
    }

    async fn machine(platform: &Platform) -> MachineSpec {
        let template = platform.template("base").await.unwrap();
        MachineSpec {
            id: MachineId::generate(),
            template: "base".to_owned(),
            template_digest: template.digest,
            vcpus: 1,
            mem_mib: 256,
            disk_mib: template.disk_mib,
        }
    }

    async fn run(execution: &dyn Execution, argv: &[&str], background: bool) -> String {
        let spec = ExecSpec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            background,
            timeout_ms: Some(60_000),
            ..ExecSpec::default()
        };
        let mut channel = execution.guest().exec(spec).await.unwrap();
        let mut stdout = Vec::new();
        loop {
            let frame = channel.receiver.next().await.unwrap();
            match frame.kind {
                FrameType::Stdout => stdout.extend_from_slice(&frame.payload),
                FrameType::Started | FrameType::Stderr => {}
                _ => match last_frame(&frame).unwrap() {
                    GuestResponse::Exited { code, .. } => {
                        assert!(background || code == Some(0), "{code:?}");
                        return String::from_utf8(stdout).unwrap();
                    }
                    other => panic!("{other:?}"),
                },
            }
        }
    }

    /// What the counter in the guest answers; waits for it to listen.
    async fn count(execution: &dyn Execution) -> String {
        let mut stream = loop {
            match execution.connect(PORT).await {
                Err(ConnectError::Refused { .. }) => tokio::time::sleep(Duration::from_millis(100)).await,
                other => break other.unwrap(),
            }
        };
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    fn unix_ns() -> i128 {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        i128::try_from(now.unwrap().as_nanos()).unwrap()
    }

    /// The guest's wall clock is the host's, but for 50 ms.
    async fn assert_clock_is_right(execution: &dyn Execution) {
        let before = unix_ns();
        let guest: i128 = run(execution, &["date", "+%s%N"], false)
            .await
            .trim()
            .parse()
            .unwrap();
        let slack = 50_000_000;
        assert!(
            (before - slack..=unix_ns() + slack).contains(&guest),
            "guest's clock is off by {} ns since before",
            guest - before
        );
    }

    async fn sleep_as(execution: &dyn Execution, generation: u64) {
        let freeze = execution.freeze().await.unwrap();
        let stats = execution.persist(generation).await.unwrap();
        println!("generation {generation}: {freeze:?} {stats:?}");
        execution.quit().await;
    }

    async fn sleep_and_wake(platform: &Platform, machine: &MachineSpec) -> Arc<dyn Execution> {
        let execution = match platform.boot(machine, &ExecutionId::generate()).await {
            Ok(execution) => execution,
            Err(error) => {
                let console = platform.console_tail(&machine.id, 4000).await.unwrap();
                panic!("{error:?}\n{}", String::from_utf8_lossy(&console));
            }
        };
        run(&*execution, &["sh", "-c", "echo kept >/root/file"], false).await;
        run(&*execution, &["python3", "-c", COUNTER], true).await;
        assert_eq!(count(&*execution).await, "1");
        sleep_as(&*execution, 1).await;
        assert_eq!(
            platform.inspect_image(&machine.id).await,
            ImageState::Valid { generation: 1 }
        );

        let (execution, stages) = platform
            .restore(machine, &ExecutionId::generate(), 1, None)
            .await
            .unwrap();
        println!("wake: {stages:?}");
        assert_eq!(count(&*execution).await, "2");
        execution.first_byte().await;
        assert_clock_is_right(&*execution).await;
        assert_eq!(run(&*execution, &["cat", "/root/file"], false).await, "kept\n");
        execution.freeze().await.unwrap();
        println!("run: {:?}", execution.run().await.unwrap());
        assert_eq!(count(&*execution).await, "3");
        execution
    }

    #[test]
    fn memory_disk_network_and_clock_of_a_machine_survive_its_sleep_and_a_restart_of_torpord() {
        on_a_host(async |dir| {
            let (machine, name) = until_killed(async || {
                let platform = start(dir).await;
                let machine = machine(&platform).await;
                let execution = sleep_and_wake(&platform, &machine).await;
                let name = execution.id().clone();
                std::mem::forget((platform, execution));
                (machine, name)
            });

            let platform = start(dir).await;
            let adopted = platform.adopt().await.pop().unwrap();
            assert_eq!(
                (adopted.execution.id(), adopted.state),
                (&name, VmmState::Running)
            );
            assert_eq!(count(&*adopted.execution).await, "4");
            sleep_as(&*adopted.execution, 2).await;

            platform.blanks_settled().await;
            let (execution, stages) = platform
                .restore(&machine, &ExecutionId::generate(), 2, None)
                .await
                .unwrap();
            println!("wake with a blank VMM ready: {stages:?}");
            assert_eq!(count(&*execution).await, "5");
            assert_clock_is_right(&*execution).await;
            execution.quit().await;
            platform.stop().await;
            assert_eq!(std::fs::read_dir(dir.join("run/exec")).unwrap().count(), 0);
            assert_eq!(std::fs::read_dir(dir.join("netns")).unwrap().count(), 0);
        });
    }

    #[test]
    fn a_vmm_runs_in_a_scope_of_its_own() {
        on_a_host(async |dir| {
            let platform = start(dir).await;
            let machine = machine(&platform).await;
            let execution = platform.boot(&machine, &ExecutionId::generate()).await.unwrap();
            let json = std::fs::read(
                dir.join("run/exec")
                    .join(execution.id().as_str())
                    .join("execution.json"),
            );
            let record: torpor_agent::execution::record::Record =
                serde_json::from_slice(&json.unwrap()).unwrap();
            let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", record.process.pid)).unwrap();
            assert!(cgroup.contains("/torpor.slice/torpor-vmm-exe_"), "{cgroup}");
            execution.quit().await;
            platform.stop().await;
        });
    }
}
