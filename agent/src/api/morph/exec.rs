//! `/instance/{id}/exec` and `/exec/sse`: a command line, or a program and its arguments, answered at its end or as
//! it goes. Neither has a time limit of ours.

use super::super::answer::Events;
use super::super::error::Failure;
use super::super::extract::{Json as Body, Named};
use super::super::facade::text::{Decoder, ascii_json};
use super::super::validate;
use crate::inside::processes::Command;
use crate::inside::session::{SessionEvent, SessionEvents};
use crate::machine::fleet::{Fleet, WakeSource};
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::convert::Infallible;
use torpor_api::http::ExecRequest;
use utoipa::ToSchema;

/// The longest that a command may run; the SDK knows no limit.
const LONGEST_MS: u64 = 86_400_000;
/// A template may come without bash.
const LINE: &str = "if command -v bash >/dev/null 2>&1; then exec bash -c \"$1\"; fi; exec sh -c \"$1\"";
/// A program that is not there ends as a shell has it, with 127 and a line on stderr: for the SDK everything that
/// is not an exit code is a failure of the host.
const PROGRAM: &str = "exec \"$@\"";

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Exec {
    command: Vec<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Done {
    exit_code: i32,
    stdout: String,
    stderr: String,
}

/// One element is a line for a shell; several are a program with its arguments.
fn request(exec: Exec) -> Result<ExecRequest, Failure> {
    let Exec { command } = exec;
    let script = match command.as_slice() {
        [] => return Err(Failure::invalid("command is empty")),
        [_] => LINE,
        _ => PROGRAM,
    };
    let shell = ["/bin/sh", "-c", script, "sh"].map(str::to_owned);
    let argv = shell.into_iter().chain(command).collect();
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
    let result = fleet.inside(id, WakeSource::Api).exec(request(exec)?).await?;
    Ok(Json(Done {
        exit_code: result.exit_code.unwrap_or(-1),
        stdout: result.stdout,
        stderr: result.stderr,
    }))
}

/// What turns a session into lines of server-sent events.
struct Lines {
    events: SessionEvents,
    stdout: Decoder,
    stderr: Decoder,
    over: bool,
}

fn line(value: &Value) -> String {
    format!("data: {}\n\n", ascii_json(value))
}

fn piece(kind: &str, text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    line(&json!({ "type": kind, "content": text }))
}

impl Lines {
    fn rest(&mut self) -> String {
        piece("stdout", &self.stdout.finish()) + &piece("stderr", &self.stderr.finish())
    }

    fn end(&mut self, code: i32) -> String {
        self.over = true;
        self.rest() + &line(&json!({ "type": "exit_code", "content": code })) + "data: [DONE]\n\n"
    }

    async fn next(&mut self) -> Option<String> {
        if self.over {
            return None;
        }
        match self.events.next().await {
            Some(Ok(SessionEvent::Stdout(bytes))) => Some(piece("stdout", &self.stdout.push(&bytes))),
            Some(Ok(SessionEvent::Stderr(bytes))) => Some(piece("stderr", &self.stderr.push(&bytes))),
            Some(Ok(SessionEvent::Lost(n_bytes))) => {
                let text = format!("\n[{n_bytes} bytes of output were lost]\n");
                Some(piece("stderr", &text))
            }
            Some(Ok(SessionEvent::Ended { code, .. })) => Some(self.end(code)),
            // Without an exit code the SDK would report success.
            Some(Err(error)) => {
                let text = piece("stderr", &format!("\n{error}\n"));
                Some(text + &self.end(-1))
            }
            None => Some(self.end(-1)),
        }
    }
}

pub(super) async fn stream(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(exec): Body<Exec>,
) -> Result<Events, Failure> {
    let command = Command::from(request(exec)?);
    let session = fleet.inside(id, WakeSource::Api).open(command).await?;
    let lines = Lines {
        events: session.events,
        stdout: Decoder::default(),
        stderr: Decoder::default(),
        over: false,
    };
    let body = futures_util::stream::unfold(lines, |mut lines| async move {
        let text = lines.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(text)), lines))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    Ok(Events(
        (headers, axum::body::Body::from_stream(body)).into_response(),
    ))
}
