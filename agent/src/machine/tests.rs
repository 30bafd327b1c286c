//! The lifecycle over a real store and a simulated host.

mod admission;
mod faults;
mod instants;
mod leases;
mod oracle;
mod restart;
mod retention;
mod snapshots;
mod usage;
mod wake;

use super::clock::ManualClock;
use super::driver::PauseOrder;
use super::error::MachineError;
use super::fleet::{CreateOrder, Fleet, Settings, WakeSource};
use super::simulated::{SimulatedHost, SimulatedHypervisor};
use crate::store::{EventFilter, Store};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use torpor_api::MachineId;
use torpor_api::http::{CreateMachine, Event, ExecRequest, Machine, MachineStatus, ResumeFrom};

pub(crate) const START_UNIX_MS: u64 = 1_700_000_000_000;

/// A host with one torpord over it, which can be replaced.
pub(crate) struct World {
    pub(crate) host: Arc<SimulatedHost>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) fleet: Fleet,
    pub(crate) directory: TempDir,
    settings: Settings,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(Settings::default())
    }

    pub(crate) fn with(settings: Settings) -> Self {
        let host = SimulatedHost::new();
        let clock = Arc::new(ManualClock::at(START_UNIX_MS));
        let directory = scratch();
        let fleet = torpord(&host, &clock, &directory, &settings);
        Self {
            host,
            clock,
            fleet,
            directory,
            settings,
        }
    }

    /// torpord is killed and started again: nothing that it held in memory is left.
    pub(crate) async fn restart(&mut self) {
        self.fleet.halt().await;
        // What was in the store's queue is on disk before the next one reads; a kill would have lost it.
        let event = self.fleet.event(
            &MachineId::generate(),
            "test.killed",
            "test",
            serde_json::Value::Null,
        );
        self.fleet.store().append_event(event).await.unwrap();
        self.fleet = torpord(&self.host, &self.clock, &self.directory, &self.settings);
        self.fleet.recover().await.unwrap();
    }

    pub(crate) async fn create(&self) -> MachineId {
        self.create_from(serde_json::json!({})).await.unwrap()
    }

    pub(crate) async fn create_from(&self, body: serde_json::Value) -> Result<MachineId, MachineError> {
        let body: CreateMachine = serde_json::from_value(body).unwrap();
        self.fleet
            .create(CreateOrder {
                body,
                idempotency: None,
            })
            .await
    }

    pub(crate) async fn pause(&self, id: &MachineId) -> Result<(), MachineError> {
        self.fleet.pause(id, PauseOrder::by("api")).await
    }

    pub(crate) async fn resume(&self, id: &MachineId) -> Result<(), MachineError> {
        self.fleet.resume(id, ResumeFrom::Memory).await
    }

    pub(crate) async fn delete(&self, id: &MachineId) -> Result<(), MachineError> {
        self.fleet.delete(id, PauseOrder::by("api")).await
    }

    /// A request: wakes if need be, and is over at once.
    pub(crate) async fn touch(&self, id: &MachineId) -> Result<(), MachineError> {
        self.fleet
            .wake(id, WakeSource::Http, serde_json::Value::Null)
            .await
            .map(drop)
    }

    pub(crate) async fn exec(&self, id: &MachineId, program: &str) -> Result<u64, MachineError> {
        let request = ExecRequest {
            argv: vec![program.to_owned()],
            ..ExecRequest::default()
        };
        self.fleet
            .exec(id, request)
            .await
            .map(|result| result.stdout.parse().unwrap())
    }

    pub(crate) async fn view(&self, id: &MachineId) -> Machine {
        self.fleet.view(id).await.unwrap()
    }

    pub(crate) async fn status(&self, id: &MachineId) -> MachineStatus {
        self.view(id).await.status
    }

    /// Wait until the machine is shown so. Drivers tell of every change, so nothing is polled for long.
    pub(crate) async fn reaches(&self, id: &MachineId, wanted: MachineStatus) {
        let reached = async {
            while self.status(id).await != wanted {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reached)
            .await
            .unwrap_or_else(|_| panic!("{id} never became {wanted:?}"));
    }

    pub(crate) async fn recorded(&self, id: &MachineId) -> Vec<Event> {
        let filter = EventFilter {
            machine: Some(id.clone()),
            after: 0,
            limit: 1000,
        };
        self.fleet.store().events(filter).await.unwrap()
    }

    pub(crate) async fn events(&self, id: &MachineId) -> Vec<String> {
        let events = self.recorded(id).await;
        events.into_iter().map(|event| event.kind).collect()
    }

    pub(crate) async fn count(&self, id: &MachineId, kind: &str) -> usize {
        self.events(id)
            .await
            .iter()
            .filter(|event| *event == kind)
            .count()
    }
}

/// In memory where there is a file system for that: what a sync costs is no part of what is tested.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn torpord(
    host: &Arc<SimulatedHost>,
    clock: &Arc<ManualClock>,
    directory: &TempDir,
    settings: &Settings,
) -> Fleet {
    let store = Store::open(&directory.path().join("torpor.db")).unwrap();
    let hypervisor = Arc::new(SimulatedHypervisor(Arc::clone(host)));
    Fleet::new(store, hypervisor, Arc::clone(clock) as _, settings.clone())
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.host.violations(), Vec::<String>::new());
        }
    }
}
