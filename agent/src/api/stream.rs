//! `/v1/machines/{id}/exec/stream`: a process as it runs, over WebSocket both ways or as server-sent events. It
//! goes on over pauses; a client that goes away leaves it running.

use super::answer::{Events, Upgraded};
use super::error::Failure;
use super::extract::{Json as Body, Named};
use super::processes::inside;
use super::validate;
use crate::inside::Inside;
use crate::inside::processes::Command;
use crate::inside::session::{Session, SessionEvent};
use crate::machine::error::MachineError;
use crate::machine::fleet::Fleet;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use std::convert::Infallible;
use torpor_api::ApiError;
use torpor_api::guest::{AttachSpec, WindowSize};
use torpor_api::http::{ExecRequest, StreamEvent, StreamOpen, StreamOrder};

/// Largest message of a client.
const MAX_MESSAGE: usize = 1 << 20;
/// First byte of a binary message.
const STDOUT: u8 = 1;
const STDERR: u8 = 2;

pub(super) async fn web_socket(
    State(fleet): State<Fleet>,
    id: Named,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Upgraded, Failure> {
    let upgrade = upgrade.map_err(|error| Failure::invalid(error.body_text()))?;
    let inside = inside(&fleet, id);
    let upgrade = upgrade.max_message_size(MAX_MESSAGE);
    Ok(Upgraded(upgrade.on_upgrade(move |socket| async move {
        // A client that is gone needs no answer.
        let _ = converse(inside, socket).await;
    })))
}

/// Events of a command that takes what input its request holds.
pub(super) async fn server_sent(
    State(fleet): State<Fleet>,
    id: Named,
    Body(request): Body<ExecRequest>,
) -> Result<Events, Failure> {
    validate::exec(&request)?;
    let session = begin(&inside(&fleet, id), request, None, false).await?;
    let started = StreamEvent::Started {
        pid: session.pid,
        serial: session.serial,
    };
    let events = futures_util::stream::unfold(session, |mut session| async move {
        let event = session.events.next().await?;
        Some((shown(event), session))
    });
    let events = futures_util::stream::once(async { started }).chain(events);
    let events = events.map(|event| {
        Ok::<_, Infallible>(Event::default().data(serde_json::to_string(&event).unwrap_or_default()))
    });
    let events = Sse::new(events).keep_alive(KeepAlive::default());
    Ok(Events(events.into_response()))
}

/// Start a command, and feed it the input of its request.
async fn begin(
    inside: &Inside,
    mut request: ExecRequest,
    tty: Option<WindowSize>,
    more_input: bool,
) -> Result<Session, MachineError> {
    let first = request.stdin.take();
    let timeout_is_given = request.timeout_ms.is_some();
    let mut command = Command::from(request);
    // Whoever watches can stop it; only a limit that was asked for is one.
    command.timeout = command.timeout.filter(|_| timeout_is_given);
    command.stdin = first.is_some() || more_input;
    command.tty = tty;
    let session = inside.open(command).await?;
    if let Some(first) = first {
        session.input.write(first.into()).await;
        if !more_input {
            session.input.close().await;
        }
    }
    Ok(session)
}

fn shown(event: Result<SessionEvent, MachineError>) -> StreamEvent {
    match event {
        Ok(SessionEvent::Stdout(bytes)) => StreamEvent::Stdout {
            data_base64: STANDARD.encode(bytes),
        },
        Ok(SessionEvent::Stderr(bytes)) => StreamEvent::Stderr {
            data_base64: STANDARD.encode(bytes),
        },
        Ok(SessionEvent::Lost(bytes)) => StreamEvent::Lost { bytes },
        Ok(SessionEvent::Ended { code, timed_out }) => StreamEvent::Exit {
            exit_code: code,
            timed_out,
        },
        Err(error) => StreamEvent::Error {
            error: ApiError::new(error.code, error.message),
        },
    }
}

fn text(event: &StreamEvent) -> Message {
    Message::Text(serde_json::to_string(event).unwrap_or_default().into())
}

fn message(event: Result<SessionEvent, MachineError>) -> Message {
    let binary = |kind: u8, bytes: Bytes| {
        let mut message = BytesMut::with_capacity(bytes.len() + 1);
        message.put_u8(kind);
        message.put(bytes);
        Message::Binary(message.freeze())
    };
    match event {
        Ok(SessionEvent::Stdout(bytes)) => binary(STDOUT, bytes),
        Ok(SessionEvent::Stderr(bytes)) => binary(STDERR, bytes),
        other => text(&shown(other)),
    }
}

async fn converse(inside: Inside, mut socket: WebSocket) -> Result<(), axum::Error> {
    let Some(first) = socket.recv().await else {
        return Ok(());
    };
    let opened = match first? {
        Message::Text(text) => open(&inside, &text).await,
        _ => Err(invalid("the first message is no text")),
    };
    let mut session = match opened {
        Ok(session) => session,
        Err(error) => {
            socket.send(message(Err(error))).await?;
            return socket.close().await;
        }
    };
    let started = StreamEvent::Started {
        pid: session.pid,
        serial: session.serial,
    };
    socket.send(text(&started)).await?;
    let (mut sink, mut stream) = socket.split();
    // Each way by itself: a client that sends much and reads nothing yet must not stop both.
    let up = async {
        while let Some(Ok(order)) = stream.next().await {
            match order {
                Message::Binary(bytes) => session.input.write(bytes).await,
                Message::Text(text) => match serde_json::from_str(&text) {
                    Ok(StreamOrder::StdinEnd) => session.input.close().await,
                    Ok(StreamOrder::Resize { rows, cols }) => {
                        session.input.resize(WindowSize { rows, cols }).await;
                    }
                    Ok(StreamOrder::Signal { signal }) => session.input.signal(signal).await,
                    Err(error) => {
                        return Some(invalid(&format!("a message is none of the protocol: {error}")));
                    }
                },
                Message::Close(_) => return None,
                Message::Ping(_) | Message::Pong(_) => {}
            }
        }
        None
    };
    let down = async {
        while let Some(event) = session.events.next().await {
            sink.send(message(event)).await?;
        }
        Ok(())
    };
    let broken = tokio::select! {
        sent = down => { sent?; None }
        broken = up => broken,
    };
    if let Some(error) = broken {
        sink.send(message(Err(error))).await?;
    }
    sink.close().await
}

async fn open(inside: &Inside, text: &str) -> Result<Session, MachineError> {
    let opening = serde_json::from_str(text);
    match opening.map_err(|error| invalid(&format!("the first message is none of the protocol: {error}")))? {
        StreamOpen::Start { command, tty, stdin } => {
            validate::exec(&command).map_err(|failure| invalid(&failure.into_api_error().error))?;
            begin(inside, command, tty, stdin || tty.is_some()).await
        }
        StreamOpen::Attach {
            pid,
            serial,
            offset,
            stdin,
        } => {
            let spec = AttachSpec {
                pid,
                serial,
                offset,
                follow: true,
                input: stdin,
            };
            inside.attach(spec).await
        }
    }
}

fn invalid(message: &str) -> MachineError {
    MachineError::new(torpor_api::ErrorCode::InvalidRequest, message)
}
