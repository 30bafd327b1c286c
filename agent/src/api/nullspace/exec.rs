//! `POST /v1/machines/{id}/exec` and processes: commands with or without a shell, waited for or not.

use super::super::answer::NoContent;
use super::super::error::Failure;
use super::super::extract::{Json as Body, Named, OptionalJson, Path};
use super::super::validate;
use super::machines::Nothing;
use crate::inside::processes::{Command, SIGKILL};
use crate::machine::fleet::{Fleet, WakeSource};
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use torpor_api::ErrorCode;
use torpor_api::guest::ProcessEntry;
use torpor_api::http::ExecRequest;
use utoipa::ToSchema;

const DEFAULT_TIMEOUT_SECS: u64 = 30;
/// How a line comes to a shell.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

#[derive(Deserialize, ToSchema)]
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
            let [shell, option] = SHELL;
            [shell, option, &command, "sh"].map(str::to_owned).to_vec()
        } else {
            vec![command]
        };
        first.into_iter().chain(args).collect()
    }

    pub(super) fn into_native(mut self) -> Result<ExecRequest, Failure> {
        let background = self.background.unwrap_or(false);
        let seconds = self.timeout_secs.unwrap_or(DEFAULT_TIMEOUT_SECS);
        let request = ExecRequest {
            argv: self.argv(),
            env: self.envs.unwrap_or_default(),
            cwd: self.cwd,
            user: self.user,
            // The SDK sends its time limit with a background command, too, which has none.
            timeout_ms: (!background).then_some(seconds.saturating_mul(1000)),
            background,
            ..ExecRequest::default()
        };
        validate::exec(&request)?;
        Ok(request)
    }
}

/// Of a command in the background there is only the PID.
#[derive(Serialize, ToSchema)]
pub(super) struct Ran {
    pid: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr: Option<String>,
}

pub(super) async fn run(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(exec): Body<Exec>,
) -> Result<Json<Ran>, Failure> {
    let request = exec.into_native()?;
    let inside = fleet.inside(id, WakeSource::Api);
    if request.background {
        // Its input stays open: it may be sent some at any time.
        let command = Command {
            stdin: true,
            timeout: None,
            ..Command::from(request)
        };
        let pid = inside.start(command).await?;
        return Ok(Json(Ran {
            pid,
            exit_code: None,
            stdout: None,
            stderr: None,
        }));
    }
    let result = inside.exec(request).await?;
    Ok(Json(Ran {
        pid: result.pid,
        exit_code: Some(result.exit_code.unwrap_or(-1)),
        stdout: Some(result.stdout),
        stderr: Some(result.stderr),
    }))
}

/// Nothing that the SDK does not know may be in it.
#[derive(Serialize, ToSchema)]
pub(super) struct ProcessInfo {
    pid: u32,
    command: String,
    running: bool,
}

impl From<ProcessEntry> for ProcessInfo {
    fn from(process: ProcessEntry) -> Self {
        let command = match process.argv.as_slice() {
            [shell, option, line, ..] if [shell.as_str(), option.as_str()] == SHELL => line.clone(),
            argv => argv.join(" "),
        };
        Self {
            pid: process.pid,
            command,
            running: process.running,
        }
    }
}

pub(super) async fn processes(
    State(fleet): State<Fleet>,
    Named(id): Named,
) -> Result<Json<Vec<ProcessInfo>>, Failure> {
    let inside = fleet.inside(id, WakeSource::Api);
    inside.awaken().await?;
    let processes = inside.processes().await?;
    let processes = processes.into_iter().map(ProcessInfo::from);
    Ok(Json(processes.collect()))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Stdin {
    data: String,
}

/// Nothing that the SDK does not know may be in it.
#[derive(Serialize, ToSchema)]
pub(super) struct Logs {
    stdout: String,
    stderr: String,
    output: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
}

pub(super) async fn logs(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, pid)): Path<(String, u32)>,
) -> Result<Json<Logs>, Failure> {
    let logs = fleet.inside(id, WakeSource::Api).logs(pid, 0).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Json(Logs {
        stdout: text(&logs.stdout),
        stderr: text(&logs.stderr),
        output: text(&logs.output),
        exit_code: logs.exit_code,
    }))
}

pub(super) async fn send_stdin(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, pid)): Path<(String, u32)>,
    Body(stdin): Body<Stdin>,
) -> Result<NoContent, Failure> {
    let inside = fleet.inside(id, WakeSource::Api);
    inside.write_stdin(pid, stdin.data.as_bytes(), false).await?;
    Ok(NoContent)
}

pub(super) async fn kill(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, pid)): Path<(String, u32)>,
    OptionalJson(Nothing {}): OptionalJson<Nothing>,
) -> Result<NoContent, Failure> {
    let inside = fleet.inside(id, WakeSource::Api);
    match inside.kill(pid, SIGKILL).await {
        Ok(()) => Ok(NoContent),
        // Whoever cleans up after a process that has ended by itself has what they want.
        Err(error) if error.code == ErrorCode::ProcessNotFound => {
            inside.process(pid).await?;
            Ok(NoContent)
        }
        Err(error) => Err(error.into()),
    }
}
