//! Snapshots: taken, shown, changed, deleted, and cleaned up after a torpord that died.
//!
//! A row comes first, in state `creating`; the driver of the machine puts the files in place; they are made durable
//! and renamed to where snapshots are; the row becomes `ready`. A row that is not ready, and files without a ready
//! row, are removed at the next start. A deletion goes the other way round. Reads never wake.

use super::super::driver::Command;
use super::super::error::MachineError;
use super::{Fleet, cut};
use crate::store::{
    Idempotency, MachineRow, NewEvent, NewSnapshot, SnapshotCreated, SnapshotFilter, SnapshotPurpose,
    SnapshotRow,
};
use std::collections::BTreeSet;
use torpor_api::http::{CreateSnapshot, PatchSnapshot, Retention, Snapshot, SnapshotStatus};
use torpor_api::{ErrorCode, MachineId, SnapshotId};

/// A validated call for a snapshot.
#[derive(Debug, Clone, Default)]
pub struct SnapshotOrder {
    /// The body.
    pub body: CreateSnapshot,
    /// The Idempotency-Key, if one was sent.
    pub idempotency: Option<Idempotency>,
}

impl Fleet {
    /// Take a snapshot of a running or paused machine; answered when it is whole and durable. The machine is, before
    /// and after, in the same state and the same execution. If there is a snapshot of this digest, that is answered.
    ///
    /// Not to be dropped half way; a dropped one is cleaned up at the next start only.
    ///
    /// # Errors
    /// The machine has no memory, the name is taken, or it could not be taken; then nothing is left of it.
    pub async fn snapshot(&self, id: &MachineId, order: SnapshotOrder) -> Result<Snapshot, MachineError> {
        self.take_snapshot(id, order, SnapshotPurpose::User)
            .await
            .map(show)
    }

    /// Snapshots that users see, oldest first.
    ///
    /// # Errors
    /// `after` is no snapshot, or the store refuses.
    pub async fn snapshots(&self, filter: SnapshotFilter) -> Result<Vec<Snapshot>, MachineError> {
        let rows = self.shared.store.snapshots(filter).await?;
        Ok(rows.into_iter().map(show).collect())
    }

    /// The snapshot that has this ID or name.
    ///
    /// # Errors
    /// `snapshot_not_found`, or the store refuses.
    pub async fn find_snapshot(&self, text: &str) -> Result<Snapshot, MachineError> {
        self.snapshot_row(text).await.map(show)
    }

    /// Change metadata, retention or both.
    ///
    /// # Errors
    /// It is gone, or the store refuses.
    pub async fn patch_snapshot(
        &self,
        id: &SnapshotId,
        patch: PatchSnapshot,
    ) -> Result<Snapshot, MachineError> {
        let now = self.now_unix_ms();
        let row = self
            .shared
            .store
            .patch_snapshot(id.clone(), patch.metadata, patch.retention_seconds, now)
            .await?;
        self.shared.retention_changed.notify_one();
        Ok(show(row))
    }

    /// Delete a snapshot. Machines that were made from it keep what they have of it.
    ///
    /// # Errors
    /// It is gone, or its files could not be removed; the next start takes the deletion up again.
    pub async fn delete_snapshot(&self, id: &SnapshotId) -> Result<(), MachineError> {
        self.end_snapshot(id, "api", None).await
    }

    pub(in crate::machine) async fn end_snapshot(
        &self,
        id: &SnapshotId,
        actor: &'static str,
        only_if_expired_at: Option<u64>,
    ) -> Result<(), MachineError> {
        let store = &self.shared.store;
        let row = store.snapshot(id).await?.ok_or_else(|| not_found(id))?;
        if row.status == SnapshotStatus::Creating {
            let message = format!("snapshot {id} is being taken");
            return Err(MachineError::new(ErrorCode::TransitionInProgress, message));
        }
        if !store.doom_snapshot(id.clone(), only_if_expired_at).await? {
            return Ok(());
        }
        self.shared.hypervisor.delete_snapshot(id).await?;
        let detail = serde_json::json!({ "snapshot_id": id, "name": row.name });
        let event = self.event(&row.spec.id, "snapshot.deleted", actor, detail);
        let event = (row.purpose == SnapshotPurpose::User).then_some(event);
        store.remove_snapshot(id.clone(), event).await?;
        Ok(())
    }

    pub(super) async fn snapshot_row(&self, text: &str) -> Result<SnapshotRow, MachineError> {
        let row = self.shared.store.find_snapshot(text).await?;
        row.filter(|row| row.status != SnapshotStatus::Deleting)
            .ok_or_else(|| not_found(cut(text)))
    }

    pub(super) async fn take_snapshot(
        &self,
        id: &MachineId,
        order: SnapshotOrder,
        purpose: SnapshotPurpose,
    ) -> Result<SnapshotRow, MachineError> {
        let _turns = self.turns_of(&order).await;
        let (row, _) = self.look(id).await?;
        let new = NewSnapshot {
            row: new_row(&row, order.body, purpose),
            idempotency: order.idempotency,
            at_unix_ms: self.now_unix_ms(),
        };
        let snapshot = new.row.id.clone();
        match self.shared.store.create_snapshot(new).await? {
            SnapshotCreated::Before(before) => return self.ready(&before).await,
            SnapshotCreated::New => {}
        }
        match self.make_snapshot(id, &snapshot).await {
            Ok(row) => Ok(row),
            Err(error) => {
                if let Err(kept) = self.forget_snapshot(&snapshot).await {
                    tracing::error!(snapshot_id = %snapshot, error = %kept, "half-made snapshot not removed yet");
                }
                Err(error)
            }
        }
    }

    /// Calls with one key, or for one digest, come one after the other, and the later ones find what the first made.
    async fn turns_of(&self, order: &SnapshotOrder) -> Vec<super::turns::Turn> {
        let digest = order.body.digest.iter().map(|digest| format!("digest {digest}"));
        let key = order.idempotency.iter().map(|key| format!("key {}", key.key));
        self.shared.turns.take_all(digest.chain(key)).await
    }

    async fn ready(&self, id: &SnapshotId) -> Result<SnapshotRow, MachineError> {
        let row = self.shared.store.snapshot(id).await?;
        match row {
            Some(row) if row.status == SnapshotStatus::Ready => Ok(row),
            Some(_) => {
                let message = format!("snapshot {id}, which is the same, is being taken or deleted");
                Err(MachineError::new(ErrorCode::TransitionInProgress, message))
            }
            None => Err(not_found(id)),
        }
    }

    async fn make_snapshot(&self, machine: &MachineId, id: &SnapshotId) -> Result<SnapshotRow, MachineError> {
        let staged = self
            .send(machine, |reply| Command::Snapshot(id.clone(), reply))
            .await?;
        let size_bytes = self.shared.hypervisor.commit_snapshot(id).await?;
        let detail = serde_json::json!({
            "snapshot_id": id,
            "size_bytes": size_bytes,
            "freeze_us": staged.freeze.map(|freeze| freeze.freeze_us),
            "persist": staged.persist,
        });
        let event = NewEvent {
            execution: staged.execution,
            ..self.event(machine, "snapshot.created", "api", detail)
        };
        let row = self
            .shared
            .store
            .commit_snapshot(id.clone(), size_bytes, event)
            .await?;
        self.shared.retention_changed.notify_one();
        Ok(row)
    }

    pub(super) async fn forget_snapshot(&self, id: &SnapshotId) -> Result<(), MachineError> {
        self.shared.hypervisor.delete_snapshot(id).await?;
        self.shared.store.remove_snapshot(id.clone(), None).await?;
        Ok(())
    }

    /// Remove what a torpord before left half made or half deleted, and rows whose files are gone.
    pub(in crate::machine) async fn recover_snapshots(&self) -> Result<(), MachineError> {
        let store = &self.shared.store;
        for row in store.unsettled_snapshots().await? {
            if let Err(error) = self.forget_snapshot(&row.id).await {
                tracing::error!(snapshot_id = %row.id, %error, "half-made snapshot not removed");
            }
        }
        let mut on_disk: BTreeSet<SnapshotId> =
            self.shared.hypervisor.snapshots().await?.into_iter().collect();
        for id in store.ready_snapshots().await? {
            if !on_disk.remove(&id) {
                tracing::error!(snapshot_id = %id, "the files of a snapshot are gone");
                store.remove_snapshot(id, None).await?;
            }
        }
        for id in on_disk {
            tracing::warn!(snapshot_id = %id, "snapshot that was never committed is removed");
            if let Err(error) = self.shared.hypervisor.delete_snapshot(&id).await {
                tracing::error!(snapshot_id = %id, %error, "uncommitted snapshot not removed");
            }
        }
        Ok(())
    }
}

fn new_row(machine: &MachineRow, body: CreateSnapshot, purpose: SnapshotPurpose) -> SnapshotRow {
    SnapshotRow {
        id: SnapshotId::generate(),
        name: body.name,
        purpose,
        status: SnapshotStatus::Creating,
        spec: machine.spec.clone(),
        execution: None,
        digest: body.digest,
        size_bytes: 0,
        metadata: body.metadata,
        retention_seconds: body.retention_seconds,
        expires_unix_ms: None,
        created_unix_ms: 0,
        last_used_unix_ms: 0,
    }
}

pub(super) fn not_found(text: impl std::fmt::Display) -> MachineError {
    MachineError::new(ErrorCode::SnapshotNotFound, format!("no snapshot {text}"))
}

pub(super) fn show(row: SnapshotRow) -> Snapshot {
    let retention = row.retention_seconds.zip(row.expires_unix_ms);
    Snapshot {
        id: row.id,
        name: row.name,
        status: row.status,
        machine_id: row.spec.id,
        execution_id: row.execution,
        digest: row.digest,
        metadata: row.metadata,
        template: row.spec.template,
        vcpus: row.spec.vcpus,
        mem_mib: row.spec.mem_mib,
        disk_mib: row.spec.disk_mib,
        size_bytes: row.size_bytes,
        created_unix_ms: row.created_unix_ms,
        last_used_unix_ms: row.last_used_unix_ms,
        retention: retention.map(|(seconds, expires_unix_ms)| Retention {
            seconds,
            expires_unix_ms,
        }),
    }
}
