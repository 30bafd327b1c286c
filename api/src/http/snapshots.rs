//! Snapshots and forks: bodies of `/v1/snapshots`, `/v1/machines/{id}/snapshots` and `/v1/machines/{id}/fork`.

use super::{Machine, WakePolicy};
use crate::ids::{ExecutionId, MachineId, MachineName, SnapshotId};
use crate::lease::LeasePolicy;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// What a user sees of a snapshot's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum SnapshotStatus {
    /// Being taken.
    Creating,
    /// Whole; machines can be made from it.
    Ready,
    /// Being deleted.
    Deleting,
}

/// How long a snapshot is kept when nobody uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Retention {
    /// Counted from the last use: its making, and every machine made from it.
    pub seconds: u64,
    /// Unix time in milliseconds at which it is deleted.
    pub expires_unix_ms: u64,
}

/// A snapshot: memory and disk of one instant, immutable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Snapshot {
    /// Permanent identity.
    pub id: SnapshotId,
    /// Unique label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<MachineName>,
    /// Where it stands.
    pub status: SnapshotStatus,
    /// The machine that it was taken of, which may be gone.
    pub machine_id: MachineId,
    /// The execution that ran when it was taken; absent for one of a paused machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<ExecutionId>,
    /// What its maker says it holds; unique.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Free key/value pairs of the user.
    pub metadata: BTreeMap<String, String>,
    /// Template of the machine.
    pub template: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub mem_mib: u32,
    /// Size of the disk in MiB.
    pub disk_mib: u32,
    /// Room that its memory image and its disk take, some of which may be shared with machines.
    pub size_bytes: u64,
    /// Unix time of the call in milliseconds.
    pub created_unix_ms: u64,
    /// Unix time in milliseconds at which a machine was last made from it, or it was made.
    pub last_used_unix_ms: u64,
    /// Absent if it is kept until it is deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}

/// `POST /v1/machines/{id}/snapshots`; the body may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CreateSnapshot {
    /// Unique label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<MachineName>,
    /// What it holds, in the caller's words. If a snapshot has this digest already, that one is answered and
    /// nothing is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Free key/value pairs of the user.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Delete it when it was not used for so long.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention_seconds: Option<u64>,
}

/// `PATCH /v1/snapshots/{id}`: only what is given changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct PatchSnapshot {
    /// All of the metadata, anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Retention, counted from now; `null` keeps the snapshot until it is deleted.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub retention_seconds: Option<Option<u64>>,
}

/// A field that is `null` was given, too.
fn given<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// `GET /v1/snapshots`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SnapshotList {
    /// Snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Pass as `after` to get the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<SnapshotId>,
}

/// `POST /v1/machines/{id}/fork`; the body may be empty. Forks have the source's policies where none are given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ForkMachine {
    /// How many machines to make.
    pub count: u32,
    /// Lease of each; the source's if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeasePolicy>,
    /// Wake switches of each; the source's if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wake: Option<WakePolicy>,
    /// Key/value pairs of each; the source's if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Keep the snapshot that the forks are made from.
    pub keep_snapshot: bool,
}

impl Default for ForkMachine {
    fn default() -> Self {
        Self {
            count: 1,
            lease: None,
            wake: None,
            metadata: None,
            keep_snapshot: false,
        }
    }
}

/// Answer to a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Forked {
    /// The snapshot, if it was to be kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Snapshot>,
    /// The new machines.
    pub machines: Vec<Machine>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_tells_null_from_nothing() {
        let patch = |text: &str| {
            serde_json::from_str::<PatchSnapshot>(text)
                .unwrap()
                .retention_seconds
        };
        assert_eq!(patch("{}"), None);
        assert_eq!(patch(r#"{"retention_seconds":null}"#), Some(None));
        assert_eq!(patch(r#"{"retention_seconds":60}"#), Some(Some(60)));
    }
}
