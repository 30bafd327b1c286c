//! A host of a test's own: directories, a template, namespaces, and a torpord's platform on it.

use super::fake_vmm;
use super::own_host::{in_namespaces, runtime};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use torpor_agent::execution::record::Record;
use torpor_agent::execution::{BlankConfig, Platform};
use torpor_agent::machine::hypervisor::{Hypervisor as _, MachineSpec, PlatformConfig, SleeperLimits};
use torpor_agent::net::NetConfig;
use torpor_api::MachineId;

/// A host with a template, and how its VMMs behave.
pub(crate) struct Host {
    dir: tempfile::TempDir,
    pub(crate) max_slots: u16,
    pub(crate) sleepers: SleeperLimits,
}

impl Host {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) async fn start(&self, mode: &str) -> Arc<Platform> {
        let config = PlatformConfig {
            state_dir: self.path("state"),
            run_dir: self.path("run"),
            template_dirs: vec![self.path("templates")],
            vmm_path: fake_vmm::install(self.dir.path(), mode),
            boot_timeout: Duration::from_secs(if mode == "silent_guest" { 1 } else { 30 }),
            console_limit_bytes: 1 << 20,
            max_parked: 4,
            blank_vmms: 1,
            sleepers: self.sleepers,
            max_slots: self.max_slots,
        };
        let net = NetConfig {
            netns_dir: self.path("netns"),
            max_slots: self.max_slots,
            spares: 1,
            nameserver: Ipv4Addr::new(192, 0, 2, 53),
        };
        Platform::start_with(config, net, BlankConfig::default())
            .await
            .unwrap()
    }

    pub(crate) async fn machine(&self, platform: &Platform) -> MachineSpec {
        let template = platform.template("base").await.unwrap();
        MachineSpec {
            id: MachineId::generate(),
            template: "base".to_owned(),
            template_digest: template.digest,
            vcpus: 1,
            mem_mib: 256,
            disk_mib: 16,
        }
    }

    /// Names of the run directories.
    pub(crate) fn run_dirs(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path("run/exec")).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    pub(crate) fn record(&self, run_dir: &str) -> Record {
        let json = fs::read(self.path("run/exec").join(run_dir).join("execution.json")).unwrap();
        serde_json::from_slice(&json).unwrap()
    }

    pub(crate) fn netns(&self) -> usize {
        fs::read_dir(self.path("netns")).unwrap().count()
    }
}

pub(crate) fn on_a_host(test: impl AsyncFnOnce(&mut Host) + Send + 'static) {
    in_namespaces(move || {
        let dir = tempfile::tempdir().unwrap();
        make_template(&dir.path().join("templates/base"));
        let mut host = Host {
            dir,
            max_slots: 8,
            sleepers: SleeperLimits::default(),
        };
        let runtime = runtime();
        let limit = Duration::from_secs(60);
        runtime
            .block_on(async { tokio::time::timeout(limit, test(&mut host)).await })
            .unwrap();
        drop(runtime);
    });
}

fn make_template(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("vmlinux"), b"kernel").unwrap();
    File::create(dir.join("rootfs.ext4"))
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    let json =
        r#"{"name":"base","kernel":"vmlinux","rootfs":"rootfs.ext4","cmdline_extra":"fake.extra","id":"1"}"#;
    fs::write(dir.join("template.json"), json).unwrap();
}
