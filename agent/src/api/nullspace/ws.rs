//! `GET /v1/machines/{id}/ws`: commands and terminals as they go, in JSON text frames.
//!
//! One task per connection. Any number of commands can be had on one; each has a task that turns its events into
//! frames, and all frames leave through one queue. When the connection ends, processes stay, and so do terminals:
//! both can be connected to again.

mod exec;
mod pty;

use super::super::answer::Upgraded;
use super::super::error::Failure;
use super::super::extract::{Named, Query};
use super::dialect::words;
use crate::inside::Inside;
use crate::machine::error::MachineError;
use crate::machine::fleet::{Fleet, WakeSource};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::sync::mpsc;
use torpor_api::ErrorCode;
use utoipa::IntoParams;

pub(super) use pty::{kill, list, resize, show};

/// Frames that wait for a slow client; a process is held up when they are so many.
const QUEUE_LEN: usize = 64;
/// The largest frame of a client.
const MAX_FRAME_BYTES: usize = 1 << 20;
/// What the vendor does, too; it also finds out who is gone.
const PING_EVERY: Duration = Duration::from_secs(15);

#[derive(Deserialize, IntoParams)]
pub(super) struct Channel {
    channel: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Exec,
    Pty,
}

/// Where the frames of one connection go.
type Outbox = mpsc::Sender<Value>;

pub(super) fn upgrade(
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<WebSocketUpgrade, Failure> {
    let upgrade = upgrade.map_err(|error| Failure::invalid(error.body_text()))?;
    Ok(upgrade.max_message_size(MAX_FRAME_BYTES))
}

pub(super) async fn connect(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(channel): Query<Channel>,
    upgraded: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Upgraded, Failure> {
    let kind = match channel.channel.as_deref() {
        Some("exec") => Kind::Exec,
        Some("pty") => Kind::Pty,
        Some(_) | None => {
            let message = "of the channels of this WebSocket, exec and pty are implemented";
            return Err(Failure::new(ErrorCode::NotImplemented, message));
        }
    };
    let inside = fleet.inside(id, WakeSource::Api);
    let upgrade = upgrade(upgraded)?;
    Ok(Upgraded(
        upgrade.on_upgrade(move |socket| serve(socket, inside, kind)),
    ))
}

/// The error frame of a request.
fn failed(id: &str, error: &MachineError) -> Value {
    let (_, code) = words(error.code);
    json!({ "type": "error", "id": id, "message": error.message, "code": code })
}

fn misread(message: impl std::fmt::Display) -> Value {
    json!({ "type": "error", "id": "", "message": format!("this frame is not understood: {message}"), "code": "invalid_request" })
}

async fn serve(socket: WebSocket, inside: Inside, kind: Kind) {
    let (mut sink, mut source) = socket.split();
    let (outbox, mut frames) = mpsc::channel::<Value>(QUEUE_LEN);
    let writer = async move {
        let mut ping = tokio::time::interval(PING_EVERY);
        loop {
            let message = tokio::select! {
                frame = frames.recv() => match frame {
                    Some(frame) => Message::Text(frame.to_string().into()),
                    None => break,
                },
                _ = ping.tick() => Message::Ping(bytes::Bytes::new()),
            };
            if sink.send(message).await.is_err() {
                return;
            }
        }
        let _ = sink.close().await;
    };
    let reader = async move {
        let mut exec = exec::Commands::new(inside.clone(), outbox.clone());
        let mut pty = pty::Terminals::new(inside, outbox);
        while let Some(Ok(message)) = source.next().await {
            match (message, kind) {
                (Message::Text(text), Kind::Exec) => exec.take(text.as_str()).await,
                (Message::Text(text), Kind::Pty) => pty.take(text.as_str()).await,
                (Message::Close(_), _) => break,
                (Message::Binary(_) | Message::Ping(_) | Message::Pong(_), _) => {}
            }
        }
    };
    // A client that closes is answered at once, whatever its commands still do.
    tokio::select! {
        () = writer => {}
        () = reader => {}
    }
}
