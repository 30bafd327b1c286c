//! `/instance/{id}/exec`: a command line, or a program and its arguments. Neither has a time limit of ours.

use super::super::error::Failure;
use super::super::extract::{Json as Body, Named};
use super::super::validate;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use torpor_api::http::ExecRequest;

/// The longest that a command may run; the SDK knows no limit.
const LONGEST_MS: u64 = 86_400_000;
/// A template may come without bash.
const SHELL: &str = "if command -v bash >/dev/null 2>&1; then exec bash -c \"$1\"; fi; exec sh -c \"$1\"";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Exec {
    command: Vec<String>,
}

#[derive(Serialize)]
pub(super) struct Done {
    exit_code: i32,
    stdout: String,
    stderr: String,
}

/// One element is a line for a shell; several are a program with its arguments.
pub(super) fn request(exec: Exec) -> Result<ExecRequest, Failure> {
    let argv = match <[String; 1]>::try_from(exec.command) {
        Ok([line]) => ["/bin/sh", "-c", SHELL, "sh", &line].map(str::to_owned).to_vec(),
        Err(argv) => argv,
    };
    let request = ExecRequest {
        argv,
        timeout_ms: Some(LONGEST_MS),
        ..ExecRequest::default()
    };
    validate::exec(&request)?;
    Ok(request)
}

pub(super) async fn run(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(exec): Body<Exec>,
) -> Result<Json<Done>, Failure> {
    let result = fleet.exec(&id, request(exec)?).await?;
    Ok(Json(Done {
        exit_code: result.exit_code.unwrap_or(-1),
        stdout: result.stdout,
        stderr: result.stderr,
    }))
}
