//! Snapshots of machines: file work on blocking threads, and what its failures mean to a caller.

use torpor_api::vmm::Shape;
use torpor_api::{ErrorCode, SnapshotId};

use super::{Platform, blocking, images_error};
use crate::images::snapshots::{SnapshotError, Wanted};
use crate::machine::hypervisor::{HypervisorError, MachineSpec};

fn failed(what: String) -> impl FnOnce(SnapshotError) -> HypervisorError {
    move |error| {
        let code = match &error {
            SnapshotError::Files(files) if files.is_disk_full() => ErrorCode::DiskFull,
            SnapshotError::Files(_) => ErrorCode::SnapshotFailed,
            SnapshotError::Manifest { .. } | SnapshotError::Unusable { .. } => ErrorCode::ImageCorrupt,
            SnapshotError::Missing { .. } => ErrorCode::SnapshotNotFound,
            SnapshotError::Incompatible { .. } => ErrorCode::ImageIncompatible,
        };
        HypervisorError::new(code, what).because(error)
    }
}

impl Platform {
    pub(super) async fn stage(
        &self,
        machine: &MachineSpec,
        generation: u64,
        snapshot: &SnapshotId,
    ) -> Result<(), HypervisorError> {
        let (images, files, id) = (
            self.images.clone(),
            self.images.machine(&machine.id),
            snapshot.clone(),
        );
        let what = format!("cannot take a snapshot of {}", machine.id);
        blocking(ErrorCode::SnapshotFailed, move || {
            images
                .stage_snapshot(&files, generation, &id)
                .map_err(failed(what))
        })
        .await
    }

    pub(super) async fn commit(&self, snapshot: &SnapshotId) -> Result<u64, HypervisorError> {
        let (images, id) = (self.images.clone(), snapshot.clone());
        blocking(ErrorCode::SnapshotFailed, move || {
            let what = format!("cannot make snapshot {id} durable");
            images.commit_snapshot(&id).map_err(failed(what))
        })
        .await
    }

    pub(super) async fn remove(&self, snapshot: &SnapshotId) -> Result<(), HypervisorError> {
        let (images, id) = (self.images.clone(), snapshot.clone());
        blocking(ErrorCode::Internal, move || {
            let what = format!("cannot remove snapshot {id}");
            images
                .delete_snapshot(&id)
                .map_err(images_error(ErrorCode::Internal, what))
        })
        .await
    }

    pub(super) async fn committed(&self) -> Result<Vec<SnapshotId>, HypervisorError> {
        let images = self.images.clone();
        blocking(ErrorCode::Internal, move || {
            images
                .committed_snapshots()
                .map_err(images_error(ErrorCode::Internal, "cannot list the snapshots"))
        })
        .await
    }

    pub(super) async fn clone_from(
        &self,
        snapshot: &SnapshotId,
        machine: &MachineSpec,
    ) -> Result<u64, HypervisorError> {
        let claim = self.claims.take(&machine.id).await;
        let (images, files, id) = (
            self.images.clone(),
            self.images.machine(&machine.id),
            snapshot.clone(),
        );
        let machine = machine.clone();
        blocking(ErrorCode::SnapshotFailed, move || {
            let _claim = claim;
            let wanted = Wanted {
                shape: Shape {
                    vcpus: machine.vcpus,
                    mem_mib: machine.mem_mib,
                },
                template_digest: &machine.template_digest,
            };
            let what = format!("cannot make {} from snapshot {id}", machine.id);
            images.clone_snapshot(&id, &files, wanted).map_err(failed(what))
        })
        .await
    }
}
