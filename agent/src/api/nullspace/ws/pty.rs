//! Terminals: of one connection, and as a list. A terminal is a process with one; its ID says which, so that every
//! connection finds it.

use super::super::super::answer::NoContent;
use super::super::super::error::Failure;
use super::super::super::extract::{Json as Body, Named, Path};
use super::super::super::validate;
use super::{Outbox, failed, misread};
use crate::inside::Inside;
use crate::inside::processes::{Command, SIGKILL};
use crate::inside::session::{Session, SessionEvent, SessionEvents, SessionInput};
use crate::machine::error::MachineError;
use crate::machine::fleet::{Fleet, WakeSource};
use axum::Json;
use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use torpor_api::ErrorCode;
use torpor_api::guest::{AttachSpec, ProcessEntry, WindowSize};
use torpor_api::http::ExecRequest;
use utoipa::ToSchema;

/// A template may come without bash.
const LOGIN_SHELL: &str = "if command -v bash >/dev/null 2>&1; then exec bash -l; fi; exec sh -l";
const DEFAULT_SIZE: WindowSize = WindowSize { rows: 30, cols: 120 };

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Frame {
    #[serde(rename = "pty_start")]
    Start {
        id: String,
        cols: Option<u16>,
        rows: Option<u16>,
        cwd: Option<String>,
        envs: Option<BTreeMap<String, String>>,
    },
    #[serde(rename = "pty_connect")]
    Connect {
        id: String,
        session_id: Option<String>,
        pid: Option<Which>,
    },
    #[serde(rename = "pty_input")]
    Input {
        data: Option<String>,
        data_base64: Option<String>,
    },
    #[serde(rename = "pty_resize")]
    Resize { cols: u16, rows: u16 },
    #[serde(rename = "pty_kill")]
    Kill {},
}

/// The SDK takes whatever it is given for a PID.
#[derive(Deserialize)]
#[serde(untagged)]
enum Which {
    Pid(u32),
    Session(String),
}

/// The one terminal that a connection has at a time.
pub(super) struct Terminals {
    inside: Inside,
    outbox: Outbox,
    input: Option<SessionInput>,
}

fn session_id(pid: u32, serial: u64) -> String {
    format!("ses_{pid}_{serial}")
}

/// PID and serial number of a terminal's ID.
fn parse(session: &str) -> Option<(u32, u64)> {
    let (pid, serial) = session.strip_prefix("ses_")?.split_once('_')?;
    Some((pid.parse().ok()?, serial.parse().ok()?))
}

impl Terminals {
    pub(super) fn new(inside: Inside, outbox: Outbox) -> Self {
        Self {
            inside,
            outbox,
            input: None,
        }
    }

    pub(super) async fn take(&mut self, text: &str) {
        let frame = match serde_json::from_str(text) {
            Ok(frame) => frame,
            Err(error) => return self.say(misread(error)).await,
        };
        match frame {
            Frame::Start {
                id,
                cols,
                rows,
                cwd,
                envs,
            } => {
                let size = WindowSize {
                    cols: cols.unwrap_or(DEFAULT_SIZE.cols),
                    rows: rows.unwrap_or(DEFAULT_SIZE.rows),
                };
                let session = start(&self.inside, size, cwd, envs.unwrap_or_default()).await;
                self.begin(id, session.map(|session| (session, size))).await;
            }
            Frame::Connect { id, session_id, pid } => {
                let session = connect(&self.inside, session_id, pid).await;
                self.begin(id, session).await;
            }
            Frame::Input { data, data_base64 } => {
                let bytes = match (data_base64, data) {
                    (Some(text), _) => STANDARD.decode(text).unwrap_or_default(),
                    (None, data) => data.unwrap_or_default().into_bytes(),
                };
                if let Some(input) = &self.input {
                    input.write(Bytes::from(bytes)).await;
                }
            }
            Frame::Resize { cols, rows } => {
                if let Some(input) = &self.input {
                    input.resize(WindowSize { rows, cols }).await;
                }
            }
            Frame::Kill {} => {
                if let Some(input) = &self.input {
                    input.signal(SIGKILL.unsigned_abs()).await;
                }
            }
        }
    }

    async fn begin(&mut self, id: String, session: Result<(Session, WindowSize), MachineError>) {
        let (session, size) = match session {
            Ok(session) => session,
            Err(error) => return self.say(failed(&id, &error)).await,
        };
        let name = session_id(session.pid, session.serial);
        self.say(json!({
            "type": "pty_started",
            "id": id,
            "session_id": name,
            "pid": session.pid,
            "cols": size.cols,
            "rows": size.rows,
            "exec_id": name,
        }))
        .await;
        self.input = Some(session.input);
        tokio::spawn(follow(id, name, session.events, self.outbox.clone()));
    }

    async fn say(&self, frame: Value) {
        // Nobody is left to hear it if this fails.
        let _ = self.outbox.send(frame).await;
    }
}

async fn start(
    inside: &Inside,
    size: WindowSize,
    cwd: Option<String>,
    mut env: BTreeMap<String, String>,
) -> Result<Session, MachineError> {
    env.entry("TERM".to_owned())
        .or_insert_with(|| "xterm-256color".to_owned());
    let request = ExecRequest {
        shell: Some(LOGIN_SHELL.to_owned()),
        env,
        cwd,
        ..ExecRequest::default()
    };
    validate::exec(&request).map_err(|failure| {
        let error = failure.into_api_error();
        MachineError::new(error.code, error.error)
    })?;
    let command = Command {
        stdin: true,
        tty: Some(size),
        timeout: None,
        ..Command::from(request)
    };
    inside.open(command).await
}

fn no_terminal(what: impl std::fmt::Display) -> MachineError {
    MachineError::new(ErrorCode::ProcessNotFound, format!("no terminal {what}"))
}

/// The terminal's process, if it is still that one.
async fn find(inside: &Inside, name: &str) -> Result<(ProcessEntry, WindowSize), MachineError> {
    let (pid, serial) = parse(name).ok_or_else(|| no_terminal(super::super::super::error::cut(name)))?;
    inside.awaken().await?;
    let process = inside.process(pid).await?;
    match process.tty {
        Some(size) if process.serial == serial => Ok((process, size)),
        Some(_) | None => Err(no_terminal(name)),
    }
}

async fn connect(
    inside: &Inside,
    name: Option<String>,
    pid: Option<Which>,
) -> Result<(Session, WindowSize), MachineError> {
    let (pid, size) = match (name, pid) {
        (Some(name), _) | (None, Some(Which::Session(name))) => {
            let (process, size) = find(inside, &name).await?;
            (process.pid, size)
        }
        (None, Some(Which::Pid(pid))) => {
            inside.awaken().await?;
            let process = inside.process(pid).await?;
            (pid, process.tty.ok_or_else(|| no_terminal(pid))?)
        }
        (None, None) => return Err(no_terminal("without session_id or pid")),
    };
    let spec = AttachSpec {
        pid,
        input: true,
        ..AttachSpec::default()
    };
    Ok((inside.attach(spec).await?, size))
}

async fn follow(id: String, name: String, mut events: SessionEvents, outbox: Outbox) {
    while let Some(event) = events.next().await {
        let frame = match event {
            Ok(SessionEvent::Stdout(bytes) | SessionEvent::Stderr(bytes)) => json!({
                "type": "pty_output",
                "id": id,
                "session_id": name,
                "data": String::from_utf8_lossy(&bytes),
                "data_base64": STANDARD.encode(&bytes),
            }),
            Ok(SessionEvent::Lost(_)) => continue,
            Ok(SessionEvent::Ended { code, .. }) => {
                json!({ "type": "pty_exited", "id": id, "session_id": name, "exit_code": code })
            }
            Err(error) => failed(&id, &error),
        };
        if outbox.send(frame).await.is_err() {
            return;
        }
    }
}

#[derive(Serialize, ToSchema)]
pub(in crate::api::nullspace) struct Info {
    session_id: String,
    pid: u32,
    cols: u16,
    rows: u16,
    exec_id: String,
}

#[derive(Deserialize, ToSchema)]
pub(in crate::api::nullspace) struct Size {
    cols: u16,
    rows: u16,
}

fn info(process: &ProcessEntry, size: WindowSize) -> Info {
    let name = session_id(process.pid, process.serial);
    Info {
        exec_id: name.clone(),
        session_id: name,
        pid: process.pid,
        cols: size.cols,
        rows: size.rows,
    }
}

pub(in crate::api::nullspace) async fn list(
    State(fleet): State<Fleet>,
    Named(id): Named,
) -> Result<Json<Vec<Info>>, Failure> {
    let inside = fleet.inside(id, WakeSource::Api);
    inside.awaken().await?;
    let processes = inside.processes().await?;
    let running = processes.iter().filter(|process| process.running);
    let terminals = running.filter_map(|process| Some(info(process, process.tty?)));
    Ok(Json(terminals.collect()))
}

pub(in crate::api::nullspace) async fn show(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, name)): Path<(String, String)>,
) -> Result<Json<Info>, Failure> {
    let (process, size) = find(&fleet.inside(id, WakeSource::Api), &name).await?;
    Ok(Json(info(&process, size)))
}

pub(in crate::api::nullspace) async fn kill(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, name)): Path<(String, String)>,
) -> Result<NoContent, Failure> {
    let inside = fleet.inside(id, WakeSource::Api);
    let (process, _) = find(&inside, &name).await?;
    inside.kill(process.pid, SIGKILL).await?;
    Ok(NoContent)
}

pub(in crate::api::nullspace) async fn resize(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, name)): Path<(String, String)>,
    Body(size): Body<Size>,
) -> Result<Json<Info>, Failure> {
    let inside = fleet.inside(id, WakeSource::Api);
    let (process, _) = find(&inside, &name).await?;
    let size = WindowSize {
        rows: size.rows,
        cols: size.cols,
    };
    inside.resize(process.pid, size).await?;
    Ok(Json(info(&process, size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_a_terminal_names_its_process() {
        assert_eq!(parse(&session_id(12, 34)), Some((12, 34)));
        for text in ["", "ses_", "ses_1", "ses_1_", "ses_x_1", "pty_1_2", "ses_-1_2"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
