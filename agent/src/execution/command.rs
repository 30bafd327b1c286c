//! Commands in the guest: from the API's request to the agent's, and back.

use torpor_api::ErrorCode;
use torpor_api::guest::{ExecSpec, GuestErrorCode};
use torpor_api::http::{ExecRequest, ExecResult};

use crate::guest_client::exec::ExecOutput;
use crate::guest_client::{GuestClient, GuestClientError};
use crate::machine::hypervisor::HypervisorError;

/// Time limit of a command that names none, in milliseconds.
const DEFAULT_TIMEOUT_MS: u64 = 30_000;

/// Run a validated request.
///
/// # Errors
/// `exec_failed`, `exec_timeout`, `guest_unreachable`.
pub async fn run(guest: &GuestClient, mut request: ExecRequest) -> Result<ExecResult, HypervisorError> {
    let stdin = request.stdin.take().map(bytes::Bytes::from);
    let output = guest.exec(exec_spec(request), stdin).await;
    exec_result(output.map_err(guest_failed)?)
}

fn guest_failed(error: GuestClientError) -> HypervisorError {
    let code = match &error {
        GuestClientError::Refused { source } => match source.code {
            GuestErrorCode::ExecFailed | GuestErrorCode::NotFound | GuestErrorCode::BadRequest => {
                ErrorCode::ExecFailed
            }
            GuestErrorCode::Os => ErrorCode::GuestUnreachable,
        },
        _ => ErrorCode::GuestUnreachable,
    };
    let message = match code {
        ErrorCode::ExecFailed => "cannot run the command",
        _ => "cannot reach the guest agent",
    };
    HypervisorError::new(code, message).because(error)
}

fn exec_spec(request: ExecRequest) -> ExecSpec {
    let argv = match request.shell {
        Some(line) => vec!["/bin/sh".to_owned(), "-c".to_owned(), line],
        None => request.argv,
    };
    let default_ms = (!request.background).then_some(DEFAULT_TIMEOUT_MS);
    ExecSpec {
        argv,
        env: request.env,
        cwd: request.cwd,
        user: request.user,
        stdin: false,
        tty: None,
        timeout_ms: request.timeout_ms.or(default_ms),
        background: request.background,
    }
}

fn exec_result(output: ExecOutput) -> Result<ExecResult, HypervisorError> {
    if output.timed_out {
        let message = format!("process {} ran out of time and was killed", output.pid);
        return Err(HypervisorError::new(ErrorCode::ExecTimeout, message));
    }
    Ok(ExecResult {
        pid: output.pid,
        exit_code: output.code,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        truncated: output.truncated,
    })
}
