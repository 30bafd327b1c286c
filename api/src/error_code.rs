//! Public error codes: stable strings, whether a retry can help, and what to do next.

use serde::{Deserialize, Serialize};

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:literal, $retryable:literal, $action:literal;)*) => {
        /// Every code that the API and the proxy can answer.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode { $($(#[$doc])* #[serde(rename = $text)] $name,)* }

        impl ErrorCode {
            /// All codes, for tables and tests.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name,)*];
            /// The code as it goes over the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str { match self { $(ErrorCode::$name => $text,)* } }
            /// HTTP status that carries it.
            #[must_use]
            pub fn status(self) -> u16 { match self { $(ErrorCode::$name => $status,)* } }
            /// Whether the same request can succeed later with nothing else changed.
            #[must_use]
            pub fn retryable(self) -> bool { match self { $(ErrorCode::$name => $retryable,)* } }
            /// What the caller does next.
            #[must_use]
            pub fn suggested_action(self) -> &'static str { match self { $(ErrorCode::$name => $action,)* } }
        }
    };
}

error_codes! {
    /// The request's shape, a field's type or a field's range is wrong.
    InvalidRequest = "invalid_request", 400, false, "Correct the field that the message names and send the request again.";
    /// No or wrong bearer token.
    Unauthorized = "unauthorized", 401, false, "Send 'Authorization: Bearer <token>' with the token of /etc/torpor/token.";
    /// The service wants an edge token and none was sent where it counts.
    EdgeTokenMissing = "edge_token_missing", 401, false, "Use a signed URL of this service: POST /v1/machines/{id}/services/{port}/grants.";
    /// The edge token was not made by this host, was damaged, or its grant was revoked.
    EdgeTokenInvalid = "edge_token_invalid", 401, false, "Ask whoever gave the URL for a new one.";
    /// The edge token's time is over.
    EdgeTokenExpired = "edge_token_expired", 401, false, "Ask whoever gave the URL for a new one.";
    /// The edge token is for another machine, port or transport.
    EdgeTokenScopeMismatch = "edge_token_scope_mismatch", 401, false, "Use the signed URL that was made for this service and transport.";
    /// No grant of this service has this ID.
    GrantNotFound = "preview_grant_not_found", 404, false, "List the grants with GET /v1/machines/{id}/services/{port}/grants.";
    /// No machine has, or ever had, this ID or name.
    MachineNotFound = "machine_not_found", 404, false, "List the machines with GET /v1/machines.";
    /// No such template on this host.
    TemplateNotFound = "template_not_found", 404, false, "List the templates with GET /v1/templates.";
    /// No snapshot has this ID or name.
    SnapshotNotFound = "snapshot_not_found", 404, false, "List the snapshots with GET /v1/snapshots.";
    /// The machine exposes no service of this name or port.
    ServiceNotFound = "service_not_found", 404, false, "List the machine's services with GET /v1/machines/{id}.";
    /// The route does not exist.
    RouteNotFound = "route_not_found", 404, false, "Check the path; every route begins with /v1.";
    /// The route exists, not for this method.
    MethodNotAllowed = "method_not_allowed", 405, false, "Use a method that the Allow header names.";
    /// The label is taken by another machine.
    NameConflict = "name_conflict", 409, false, "Choose another name, or delete the machine that has it.";
    /// The Idempotency-Key was used before with another body.
    IdempotencyConflict = "idempotency_conflict", 409, false, "Use a new key for another request.";
    /// The machine is in a state in which the operation has no meaning.
    MachineNotReady = "machine_not_ready", 409, false, "Look at the machine's state, and resume or restart it first.";
    /// Another operation on the machine is under way.
    TransitionInProgress = "transition_in_progress", 409, true, "Wait for the operation under way and try again.";
    /// The JSON body is too large.
    BodyTooLarge = "body_too_large", 413, false, "Send a smaller body.";
    /// The head of an HTTP request is too large.
    HeadTooLarge = "head_too_large", 431, false, "Send fewer or shorter headers, cookies or a shorter URL.";
    /// An auto-resume policy and destroy-on-expiry exclude each other.
    AutoResumeNeedsPause = "auto_resume_needs_pause", 400, false, "Set the lease action to 'pause', or turn every wake switch off.";
    /// The host has no memory, slot or disk left for it.
    CapacityExceeded = "capacity_exceeded", 503, true, "Pause or delete machines, or wait until some fall asleep.";
    /// Paused, and the switch for this kind of traffic is off.
    AutoResumeDisabled = "machine_paused_auto_resume_disabled", 503, false, "Resume the machine with POST /v1/machines/{id}/resume, or turn its wake switch on.";
    /// The wake did not end within the bounded wait.
    ResumeTimeout = "machine_resume_timeout", 503, true, "Try again after the Retry-After delay; the wake goes on meanwhile.";
    /// The wake failed for a reason that may pass.
    ResumeFailed = "machine_resume_failed", 503, true, "Try again after the Retry-After delay; see the machine's events for the cause.";
    /// The machine runs, and nothing accepts on that port in the guest.
    ServiceUnreachable = "service_unreachable", 502, true, "Start a server on that port inside the machine, listening on 0.0.0.0.";
    /// The guest closed the connection before it answered.
    UpstreamClosed = "upstream_closed", 502, false, "Look at the server's own log inside the machine.";
    /// A page or the state of the image fails its checksum.
    ImageCorrupt = "image_corrupt", 500, false, "Boot the machine from its disk with POST /v1/machines/{id}/resume {\"from\":\"disk\"}; the memory is lost.";
    /// The image was made by another CPU, kernel or VMM version.
    ImageIncompatible = "incompatible_snapshot", 409, false, "Resume it on the host that made it, or boot it from its disk with {\"from\":\"disk\"}.";
    /// A pause found no room on the disk; the machine runs on.
    DiskFull = "disk_full", 507, true, "Free space in the state directory and pause again; the machine is still running.";
    /// The snapshot is the memory of a machine that sleeps.
    SnapshotInUse = "snapshot_in_use", 409, false, "Delete the machine, or resume it, and take a snapshot of it for other use.";
    /// The snapshot could not be taken; the machine is as it was.
    SnapshotFailed = "snapshot_failed", 500, true, "See the message for the cause and try again; the machine is as it was.";
    /// A pause failed; the machine runs on.
    PauseFailed = "pause_failed", 500, true, "See the machine's events for the cause and pause again; the machine is still running.";
    /// The guest did not boot or its agent did not answer.
    BootFailed = "boot_failed", 500, true, "Look at the machine's console with GET /v1/machines/{id}/logs.";
    /// The command could not be started.
    ExecFailed = "exec_failed", 502, false, "Check the command, its directory and its user.";
    /// The command ran longer than its timeout and was killed with its group.
    ExecTimeout = "exec_timeout", 504, false, "Give the command a longer timeout, or run it in the background.";
    /// The machine knows no process with this PID.
    ProcessNotFound = "process_not_found", 404, false, "List the processes with GET /v1/machines/{id}/processes.";
    /// There is nothing at this path in the guest.
    FileNotFound = "file_not_found", 404, false, "Check the path, for example with POST /v1/machines/{id}/files/list.";
    /// The user may not do this to the file.
    FilePermissionDenied = "file_permission_denied", 403, false, "Use another user, or change the file's mode first.";
    /// Something is there already, is of another kind, or is not empty.
    FileConflict = "file_conflict", 409, false, "Look at what is there with POST /v1/machines/{id}/files/stat.";
    /// The guest's kernel refused an operation on a file.
    FileFailed = "file_failed", 422, false, "See the message for what the guest's kernel said.";
    /// The guest's own disk is full.
    GuestDiskFull = "guest_disk_full", 507, false, "Remove files inside the machine.";
    /// The guest agent does not answer.
    GuestUnreachable = "guest_unreachable", 502, true, "Look at the machine's console with GET /v1/machines/{id}/logs.";
    /// No registered key has this ID.
    SshKeyNotFound = "ssh_key_not_found", 404, false, "List the registered keys with GET /v1/ssh-keys.";
    /// torpord has no SSH gateway.
    SshDisabled = "ssh_disabled", 409, false, "Give the SSH gateway an address in torpord's configuration, as ssh.listen.";
    /// No upload has this ID, or torpord was restarted since.
    UploadNotFound = "upload_not_found", 404, false, "Begin the upload anew.";
    /// An upload's part or whole is not what was announced, or its target does not take it.
    UploadFailed = "file_upload_error", 409, false, "Correct what the message names, and send that part or begin the upload anew.";
    /// Known operation, not built yet.
    NotImplemented = "not_implemented", 501, false, "See the release notes for what this version can do.";
    /// A defect of Torpor.
    Internal = "internal_error", 500, true, "See torpord's journal for the request ID, and report it.";
}

/// The one error shape of the API and the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[error("{error} ({})", code.as_str())]
pub struct ApiError {
    /// What failed, on what.
    pub error: String,
    /// Stable code.
    pub code: ErrorCode,
    /// Whether a later try can succeed.
    pub retryable: bool,
    /// What to do next.
    pub suggested_action: String,
    /// ID of the request, as in torpord's log.
    pub request_id: String,
}

impl ApiError {
    /// An error with the code's own advice; the server fills in the request ID.
    #[must_use]
    pub fn new(code: ErrorCode, error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            code,
            retryable: code.retryable(),
            suggested_action: code.suggested_action().to_owned(),
            request_id: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn codes_are_distinct_and_survive_the_wire() {
        let texts: HashSet<_> = ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(texts.len(), ErrorCode::ALL.len());
        for code in ErrorCode::ALL {
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{}\"", code.as_str()));
            assert_eq!(serde_json::from_str::<ErrorCode>(&json).unwrap(), *code);
            assert!((400..600).contains(&code.status()), "{code:?}");
        }
    }

    #[test]
    fn the_seed_document_codes_are_kept() {
        let disabled = ErrorCode::AutoResumeDisabled;
        assert_eq!(
            (disabled.as_str(), disabled.status(), disabled.retryable()),
            ("machine_paused_auto_resume_disabled", 503, false)
        );
    }
}
