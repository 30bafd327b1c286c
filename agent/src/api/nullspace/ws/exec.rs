//! Commands of one connection.

use super::super::super::facade::text::Decoder;
use super::super::exec::Exec;
use super::{Outbox, failed, misread};
use crate::inside::Inside;
use crate::inside::processes::{Command, SIGKILL};
use crate::inside::session::{Session, SessionEvent, SessionEvents, SessionInput};
use crate::machine::error::MachineError;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use torpor_api::ErrorCode;
use torpor_api::guest::AttachSpec;

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Frame {
    #[serde(rename = "exec_start")]
    Start {
        id: String,
        #[serde(flatten)]
        exec: Map<String, Value>,
    },
    #[serde(rename = "exec_connect")]
    Connect { id: String, pid: u32 },
    #[serde(rename = "exec_stdin")]
    Stdin { id: String, data: String },
    #[serde(rename = "exec_stdin_close")]
    StdinClose { id: String },
    #[serde(rename = "exec_kill")]
    Kill { id: String },
}

pub(super) struct Commands {
    inside: Inside,
    outbox: Outbox,
    inputs: HashMap<String, SessionInput>,
}

impl Commands {
    pub(super) fn new(inside: Inside, outbox: Outbox) -> Self {
        Self {
            inside,
            outbox,
            inputs: HashMap::new(),
        }
    }

    pub(super) async fn take(&mut self, text: &str) {
        let frame = match serde_json::from_str(text) {
            Ok(frame) => frame,
            Err(error) => return self.say(misread(error)).await,
        };
        match frame {
            Frame::Start { id, exec } => {
                let session = start(&self.inside, exec).await;
                self.begin(id, session).await;
            }
            Frame::Connect { id, pid } => {
                let spec = AttachSpec {
                    pid,
                    input: true,
                    ..AttachSpec::default()
                };
                let session = self.inside.attach(spec).await;
                self.begin(id, session).await;
            }
            Frame::Stdin { id, data } => {
                if let Some(input) = self.inputs.get(&id) {
                    input.write(Bytes::from(data)).await;
                }
            }
            Frame::StdinClose { id } => {
                if let Some(input) = self.inputs.get(&id) {
                    input.close().await;
                }
            }
            Frame::Kill { id } => {
                if let Some(input) = self.inputs.get(&id) {
                    input.signal(SIGKILL.unsigned_abs()).await;
                }
            }
        }
    }

    async fn begin(&mut self, id: String, session: Result<Session, MachineError>) {
        match session {
            Err(error) => self.say(failed(&id, &error)).await,
            Ok(session) => {
                let pid = session.pid;
                self.say(json!({ "type": "exec_started", "id": id, "pid": pid }))
                    .await;
                self.inputs.insert(id.clone(), session.input);
                tokio::spawn(follow(id, pid, session.events, self.outbox.clone()));
            }
        }
    }

    async fn say(&self, frame: Value) {
        // Nobody is left to hear it if this fails.
        let _ = self.outbox.send(frame).await;
    }
}

/// The connection's own way of a command has the same fields as the route's. A time limit cannot tell a command
/// that is waited for from one that is left alone, so there is none.
async fn start(inside: &Inside, exec: Map<String, Value>) -> Result<Session, MachineError> {
    let invalid = |message: String| MachineError::new(ErrorCode::InvalidRequest, message);
    let exec: Exec =
        serde_json::from_value(Value::Object(exec)).map_err(|error| invalid(error.to_string()))?;
    let request = exec
        .into_native()
        .map_err(|failure| invalid(failure.into_api_error().error))?;
    let command = Command {
        stdin: true,
        timeout: None,
        ..Command::from(request)
    };
    inside.open(command).await
}

async fn follow(id: String, pid: u32, mut events: SessionEvents, outbox: Outbox) {
    let (mut stdout, mut stderr) = (Decoder::default(), Decoder::default());
    let piece = |kind: &str, text: String| {
        let frame = json!({ "type": kind, "id": id, "pid": pid, "data": text });
        let outbox = outbox.clone();
        async move { text.is_empty() || outbox.send(frame).await.is_ok() }
    };
    while let Some(event) = events.next().await {
        let heard = match event {
            Ok(SessionEvent::Stdout(bytes)) => piece("exec_stdout", stdout.push(&bytes)).await,
            Ok(SessionEvent::Stderr(bytes)) => piece("exec_stderr", stderr.push(&bytes)).await,
            Ok(SessionEvent::Lost(_)) => true,
            Ok(SessionEvent::Ended { code, .. }) => {
                piece("exec_stdout", stdout.finish()).await;
                piece("exec_stderr", stderr.finish()).await;
                let frame = json!({ "type": "exec_exit", "id": id, "pid": pid, "exit_code": code });
                let _ = outbox.send(frame).await;
                return;
            }
            Err(error) => {
                let _ = outbox.send(failed(&id, &error)).await;
                return;
            }
        };
        if !heard {
            return;
        }
    }
}
