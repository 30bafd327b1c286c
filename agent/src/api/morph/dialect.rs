//! Errors and IDs in Morph's words.

use serde::Serialize;
use serde_json::{Value, json};
use torpor_api::{ApiError, ErrorCode, MachineId, SnapshotId};
use utoipa::ToSchema;

/// The body of a failure. The SDK reads `detail` and `error_code` if they are texts, and shows the whole body otherwise.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorBody {
    detail: String,
    error_code: &'static str,
    code: &'static str,
    retryable: bool,
    suggested_action: String,
    request_id: String,
}

pub(super) fn shape(error: ApiError) -> (u16, Value) {
    let (status, code) = match error.code {
        // A call that needs the guest of a sleeping instance conflicts with its state; nothing is unavailable.
        ErrorCode::AutoResumeDisabled => (409, "instance_paused"),
        ErrorCode::MachineNotFound => (404, "instance_not_found"),
        code => (code.status(), code.as_str()),
    };
    let body = ErrorBody {
        detail: error.error,
        error_code: code,
        code,
        retryable: error.retryable,
        suggested_action: error.suggested_action,
        request_id: error.request_id,
    };
    (status, json!(body))
}

/// An instance keeps this ID for life.
pub(super) fn instance_id(id: &MachineId) -> String {
    let random = id.as_str().trim_start_matches("mch_");
    format!("morphvm_{random}")
}

pub(super) fn snapshot_id(id: &SnapshotId) -> String {
    let random = id.as_str().trim_start_matches("snap_");
    format!("snapshot_{random}")
}
