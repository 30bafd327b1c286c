//! Warm templates: a create takes a restore of what the first boot of its template and shape was when it had booted.
//!
//! One hidden snapshot per template digest, vCPUs, memory and disk size. The first create of a shape makes it; those
//! that come before it is whole boot. It goes when nobody used it for a week, and when it could not be used once.

use super::super::driver::First;
use super::super::error::MachineError;
use super::super::hypervisor::MachineSpec;
use super::Fleet;
use crate::store::{NewSnapshot, SnapshotCreated, SnapshotPurpose, SnapshotRow};
use std::collections::BTreeMap;
use torpor_api::SnapshotId;
use torpor_api::http::SnapshotStatus;

/// One that nobody used for so long is deleted: a week.
const KEPT_S: u64 = 7 * 86_400;

impl Fleet {
    /// How a machine of this shape gets its first execution.
    pub(super) async fn first_of(&self, spec: &MachineSpec) -> First {
        if !self.shared.settings.warm_templates {
            return First::Boot;
        }
        match self.warm_or_new(spec).await {
            Ok(first) => first,
            Err(error) => {
                tracing::warn!(template = %spec.template, %error, "warm template not looked up");
                First::Boot
            }
        }
    }

    async fn warm_or_new(&self, spec: &MachineSpec) -> Result<First, MachineError> {
        let new = NewSnapshot {
            row: row_of(spec),
            idempotency: None,
            at_unix_ms: self.now_unix_ms(),
        };
        let id = new.row.id.clone();
        let before = match self.shared.store.create_snapshot(new).await? {
            SnapshotCreated::New => return Ok(First::BootAndKeep(id)),
            SnapshotCreated::Before(before) => before,
        };
        let row = self.shared.store.snapshot(&before).await?;
        let ready = row.is_some_and(|row| row.status == SnapshotStatus::Ready);
        Ok(if ready { First::Warm(before) } else { First::Boot })
    }

    /// The create is over: a snapshot that it staged is made durable beside whatever comes next.
    pub(super) fn keep_warm(&self, spec: MachineSpec, snapshot: SnapshotId, created: bool) {
        let fleet = self.clone();
        let finish = async move {
            let kept = if created {
                fleet.commit_warm(&spec, &snapshot).await
            } else {
                fleet.forget_snapshot(&snapshot).await
            };
            if let Err(error) = kept {
                tracing::warn!(template = %spec.template, %error, "no warm template kept");
                if let Err(error) = fleet.forget_snapshot(&snapshot).await {
                    tracing::error!(snapshot_id = %snapshot, %error, "half-made warm template not removed yet");
                }
            }
        };
        let halted = self.shared.halted.clone();
        self.shared
            .tasks
            .spawn(async move { halted.run_until_cancelled(finish).await });
    }

    async fn commit_warm(&self, spec: &MachineSpec, snapshot: &SnapshotId) -> Result<(), MachineError> {
        let size_bytes = self.shared.hypervisor.commit_snapshot(snapshot).await?;
        let detail = serde_json::json!({
            "snapshot_id": snapshot,
            "template": spec.template,
            "size_bytes": size_bytes,
        });
        let event = self.event(&spec.id, "template.warmed", "api", detail);
        self.shared
            .store
            .commit_snapshot(snapshot.clone(), size_bytes, event)
            .await?;
        self.shared.retention_changed.notify_one();
        Ok(())
    }
}

fn row_of(spec: &MachineSpec) -> SnapshotRow {
    SnapshotRow {
        id: SnapshotId::generate(),
        name: None,
        purpose: SnapshotPurpose::Warm,
        status: SnapshotStatus::Creating,
        // No digest of a user has a line break.
        digest: Some(format!(
            "warm\n{} {} {} {}",
            spec.template_digest, spec.vcpus, spec.mem_mib, spec.disk_mib
        )),
        spec: spec.clone(),
        execution: None,
        size_bytes: 0,
        metadata: BTreeMap::new(),
        retention_seconds: Some(KEPT_S),
        expires_unix_ms: None,
        created_unix_ms: 0,
        last_used_unix_ms: 0,
    }
}
