//! Simulated snapshots: copies of a machine's image and disk.

use super::{Files, Point, SavedImage, SimulatedHost};
use crate::machine::hypervisor::{HypervisorError, MachineSpec};
use torpor_api::vmm::VmmState;
use torpor_api::{ErrorCode, MachineId, SnapshotId};

#[derive(Debug, Clone)]
pub(super) struct Saved {
    files: Files,
    committed: bool,
}

impl SimulatedHost {
    /// Number of restores that made another machine of an image.
    #[must_use]
    pub fn n_forks(&self) -> u64 {
        self.lock().n_forks
    }

    /// Snapshots on disk, staged ones too.
    #[must_use]
    pub fn snapshots_on_disk(&self) -> Vec<SnapshotId> {
        self.lock().snapshots.keys().cloned().collect()
    }

    pub(super) async fn stage_snapshot(
        &self,
        machine: &MachineSpec,
        generation: u64,
        snapshot: &SnapshotId,
    ) -> Result<(), HypervisorError> {
        self.must_stand_still(&machine.id);
        self.faults.reach(Point::StageSnapshot).await?;
        self.must_stand_still(&machine.id);
        let mut inner = self.lock();
        let files = inner.files.get(&machine.id).cloned().unwrap_or_default();
        match &files.image {
            Some(image) if image.corrupt => Err(failed(ErrorCode::ImageCorrupt, "a checksum is wrong")),
            Some(SavedImage {
                generation: found,
                memory,
                ..
            }) if *found == generation && memory.disk_generation == files.disk_generation => {
                let saved = Saved {
                    files,
                    committed: false,
                };
                inner.snapshots.insert(snapshot.clone(), saved);
                Ok(())
            }
            Some(_) | None => Err(failed(ErrorCode::ImageCorrupt, "no image of this generation")),
        }
    }

    pub(super) async fn commit_snapshot(&self, snapshot: &SnapshotId) -> Result<u64, HypervisorError> {
        self.faults.reach(Point::CommitSnapshot).await?;
        let mut inner = self.lock();
        let saved = inner.snapshots.get_mut(snapshot).ok_or_else(missing)?;
        saved.committed = true;
        Ok(4096)
    }

    pub(super) async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), HypervisorError> {
        self.faults.reach(Point::DeleteSnapshot).await?;
        self.lock().snapshots.remove(snapshot);
        Ok(())
    }

    pub(super) fn committed_snapshots(&self) -> Vec<SnapshotId> {
        let mut inner = self.lock();
        inner.snapshots.retain(|_, saved| saved.committed);
        inner.snapshots.keys().cloned().collect()
    }

    pub(super) async fn clone_snapshot(
        &self,
        snapshot: &SnapshotId,
        machine: &MachineSpec,
    ) -> Result<u64, HypervisorError> {
        self.faults.reach(Point::CloneSnapshot).await?;
        let mut inner = self.lock();
        let saved = inner.snapshots.get(snapshot).filter(|saved| saved.committed);
        let mut files = saved.ok_or_else(missing)?.files.clone();
        let image = files.image.as_mut().ok_or_else(missing)?;
        image.fork = true;
        let generation = image.generation;
        inner.files.insert(machine.id.clone(), files);
        Ok(generation)
    }

    /// Files that change while they are copied are of no instant.
    fn must_stand_still(&self, machine: &MachineId) {
        for execution in self.live(machine) {
            let state = execution.state();
            if state == VmmState::Running {
                let violation = format!("a snapshot of {machine} was taken while its VMM was {state:?}");
                self.lock().violations.push(violation);
            }
        }
    }
}

fn failed(code: ErrorCode, what: &str) -> HypervisorError {
    HypervisorError::new(code, format!("cannot take a snapshot: {what}"))
}

fn missing() -> HypervisorError {
    HypervisorError::new(ErrorCode::SnapshotNotFound, "no such snapshot on disk")
}
