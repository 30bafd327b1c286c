//! Errors and IDs in Nullspace's words. The SDK picks the class of an exception by the code alone.

use serde::Serialize;
use serde_json::{Value, json};
use torpor_api::http::Machine;
use torpor_api::{ApiError, ErrorCode, ExecutionId};
use utoipa::ToSchema;

/// Status and code.
pub(super) fn words(code: ErrorCode) -> (u16, &'static str) {
    match code {
        // A call that needs the guest of a sleeping machine conflicts with its state; nothing is unavailable.
        ErrorCode::AutoResumeDisabled => (409, "machine_not_ready"),
        ErrorCode::AutoResumeNeedsPause => (400, "invalid_request"),
        ErrorCode::RouteNotFound => (404, "not_found"),
        code => (code.status(), code.as_str()),
    }
}

/// The body of a failure.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorBody {
    error: String,
    code: &'static str,
    retryable: bool,
    suggested_action: String,
    request_id: String,
}

pub(super) fn shape(error: ApiError) -> (u16, Value) {
    let (status, code) = words(error.code);
    let body = ErrorBody {
        error: error.error,
        code,
        retryable: error.retryable,
        suggested_action: error.suggested_action,
        request_id: error.request_id,
    };
    (status, json!(body))
}

fn random_of(execution: &ExecutionId) -> &str {
    execution.as_str().trim_start_matches("exe_")
}

/// The ID of a machine for as long as this execution of it lasts, and an alias of it ever after.
pub(super) fn machine_id_of(execution: &ExecutionId) -> String {
    format!("mch_{}", random_of(execution))
}

/// The ID under which a machine goes since its latest start or resume.
pub(super) fn machine_id(machine: &Machine) -> String {
    match &machine.last_execution_id {
        Some(execution) => machine_id_of(execution),
        None => machine.id.to_string(),
    }
}

/// The ID of what a machine holds while it is paused.
pub(super) fn pause_snapshot_id(machine: &Machine) -> Option<String> {
    let execution = machine.last_execution_id.as_ref()?;
    Some(format!("snap_{}", random_of(execution)))
}
