//! Bodies of uploads.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = UploadKind)]
pub(in crate::api::nullspace) enum Kind {
    File,
    DirectoryTar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::api::nullspace) enum SourceKind {
    RestartableFile,
    SpooledStream,
    DirectoryArchive,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::api::nullspace) enum Conflict {
    Error,
    Merge,
    Replace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::api::nullspace) enum ArchiveFormat {
    Tar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::api::nullspace) enum Checksum {
    Sha256,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = UploadStatus)]
pub(in crate::api::nullspace) enum Status {
    Created,
    Uploading,
    Staged,
    Completing,
    Completed,
    Aborted,
}

#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::api::nullspace) struct Create {
    pub(super) kind: Kind,
    pub(super) source_kind: SourceKind,
    pub(super) target_path: String,
    pub(super) content_length: u64,
    pub(super) conflict: Conflict,
    pub(super) checksum_algorithm: Checksum,
    pub(super) archive_format: Option<ArchiveFormat>,
    pub(super) whole_checksum_sha256: Option<String>,
    pub(super) user: Option<String>,
    #[serde(rename = "metadata")]
    _metadata: Option<Map<String, Value>>,
}

#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(in crate::api::nullspace) struct Complete {
    pub(super) whole_checksum_sha256: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::api::nullspace) struct Limits {
    pub(super) max_upload_bytes: u64,
    pub(super) max_part_bytes: u64,
    pub(super) max_concurrency: u32,
    pub(super) machine_staging_quota_bytes: u64,
}

/// Nothing that the SDK does not know may be in it.
#[derive(Serialize, ToSchema)]
pub(in crate::api::nullspace) struct Session {
    pub(super) upload_id: String,
    pub(super) kind: Kind,
    pub(super) source_kind: SourceKind,
    pub(super) target_path: String,
    pub(super) content_length: u64,
    pub(super) accepted_bytes: u64,
    pub(super) reserved_staging_bytes: u64,
    pub(super) part_size: u64,
    pub(super) part_count: u64,
    pub(super) max_concurrency: u32,
    pub(super) status: Status,
    pub(super) conflict: Conflict,
    pub(super) checksum_algorithm: Checksum,
    pub(super) limits: Limits,
    pub(super) created_at: String,
    pub(super) updated_at: String,
    pub(super) expires_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) next_part: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) archive_format: Option<ArchiveFormat>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) whole_checksum_sha256: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(in crate::api::nullspace) struct Begun {
    pub(super) session: Session,
}

#[derive(Serialize, ToSchema)]
pub(in crate::api::nullspace) struct Completed {
    pub(super) session: Session,
    pub(super) published_bytes: u64,
    pub(super) published_file_count: u64,
}
