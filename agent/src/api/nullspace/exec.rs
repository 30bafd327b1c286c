//! `POST /v1/machines/{id}/exec`: a command, with or without a shell, waited for or not.

use super::super::error::Failure;
use super::super::extract::{Json as Body, Named};
use super::super::validate;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use torpor_api::http::ExecRequest;

const DEFAULT_TIMEOUT_SECS: u64 = 30;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Exec {
    command: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    timeout_secs: Option<u64>,
    #[serde(default)]
    cwd: Option<String>,
    #[serde(default)]
    envs: Option<BTreeMap<String, String>>,
    #[serde(default)]
    shell: Option<bool>,
    #[serde(default)]
    background: Option<bool>,
    #[serde(default)]
    user: Option<String>,
}

impl Exec {
    /// A shell gets the command as its line and the arguments as its own; without one it is a program's name.
    fn argv(&mut self) -> Vec<String> {
        let args = self.args.take().unwrap_or_default();
        let command = std::mem::take(&mut self.command);
        let first = if self.shell.unwrap_or(false) {
            ["/bin/sh", "-c", &command, "sh"].map(str::to_owned).to_vec()
        } else {
            vec![command]
        };
        first.into_iter().chain(args).collect()
    }

    fn into_native(mut self) -> Result<ExecRequest, Failure> {
        let background = self.background.unwrap_or(false);
        let timeout_ms = self
            .timeout_secs
            .unwrap_or(DEFAULT_TIMEOUT_SECS)
            .saturating_mul(1000);
        let request = ExecRequest {
            argv: self.argv(),
            env: self.envs.unwrap_or_default(),
            cwd: self.cwd,
            user: self.user,
            // The SDK sends its time limit with a background command, too, which has none.
            timeout_ms: (!background).then_some(timeout_ms),
            background,
            ..ExecRequest::default()
        };
        validate::exec(&request)?;
        Ok(request)
    }
}

pub(super) async fn run(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(exec): Body<Exec>,
) -> Result<Json<Value>, Failure> {
    let result = fleet.exec(&id, exec.into_native()?).await?;
    Ok(Json(match result.exit_code {
        Some(exit_code) => json!({
            "pid": result.pid,
            "exit_code": exit_code,
            "stdout": result.stdout,
            "stderr": result.stderr,
        }),
        None => json!({ "pid": result.pid }),
    }))
}
