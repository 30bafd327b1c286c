//! `/v1/events` and `/v1/machines/{id}/events`: what happened.

use super::answer::EitherStream;
use super::error::Failure;
use super::extract::{Named, Query};
use crate::machine::fleet::Fleet;
use crate::store::EventFilter;
use axum::Json;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::response::IntoResponse;
use axum::response::sse::{self, Sse};
use futures_util::{SinkExt, Stream, StreamExt};
use serde::Deserialize;
use std::convert::Infallible;
use torpor_api::MachineId;
use torpor_api::http::{Event, EventList};
use utoipa::IntoParams;

const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    #[serde(default)]
    after: u64,
    limit: Option<u32>,
}

pub(super) async fn of_machine(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(page): Query<Page>,
) -> Result<Json<EventList>, Failure> {
    read(&fleet, Some(id), &page).await
}

pub(super) async fn of_host(
    State(fleet): State<Fleet>,
    Query(page): Query<Page>,
) -> Result<Json<EventList>, Failure> {
    read(&fleet, None, &page).await
}

async fn read(fleet: &Fleet, machine: Option<MachineId>, page: &Page) -> Result<Json<EventList>, Failure> {
    let limit = page.limit.unwrap_or(DEFAULT_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Failure::invalid(format!(
            "limit is {limit}, and has to be 1 to {MAX_PAGE}"
        )));
    }
    fleet.caught_up(machine.as_ref()).await;
    let events = fleet
        .store()
        .events(EventFilter {
            machine,
            after: page.after,
            limit,
        })
        .await?;
    let next_offset = events.last().map_or(page.after, |event| event.offset);
    Ok(Json(EventList { events, next_offset }))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct From {
    after: Option<u64>,
}

pub(super) async fn stream_of_machine(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(from): Query<From>,
    seen: LastEventId,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<EitherStream, Failure> {
    stream(fleet, Some(id), (from, seen), upgrade.ok()).await
}

pub(super) async fn stream_of_host(
    State(fleet): State<Fleet>,
    Query(from): Query<From>,
    seen: LastEventId,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<EitherStream, Failure> {
    stream(fleet, None, (from, seen), upgrade.ok()).await
}

/// What a client of server-sent events that connects again has seen: the last offset that it was told.
pub(super) struct LastEventId(Option<u64>);

impl<S: Sync> FromRequestParts<S> for LastEventId {
    type Rejection = Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let sent = parts.headers.get("last-event-id");
        Ok(Self(sent.and_then(|sent| sent.to_str().ok()?.parse().ok())))
    }
}

/// Events as they happen: over WebSocket if the client asks for that, else server-sent.
async fn stream(
    fleet: Fleet,
    machine: Option<MachineId>,
    (from, seen): (From, LastEventId),
    upgrade: Option<WebSocketUpgrade>,
) -> Result<EitherStream, Failure> {
    // A browser that connects again asks as it did first; nothing is told twice.
    let after = from.after.max(seen.0).unwrap_or(0);
    let events = Box::pin(follow(fleet, machine, after));
    let response = match upgrade {
        Some(upgrade) => upgrade.on_upgrade(|socket| async move {
            // A client that is gone needs no answer.
            let _ = send(socket, events).await;
        }),
        None => {
            let events = events.map(|event| {
                let sent = sse::Event::default()
                    .id(event.offset.to_string())
                    .event(&event.kind);
                Ok::<_, Infallible>(sent.data(serde_json::to_string(&event).unwrap_or_default()))
            });
            Sse::new(events)
                .keep_alive(sse::KeepAlive::default())
                .into_response()
        }
    };
    Ok(EitherStream(response))
}

/// Every event with a larger offset, those that are to come too.
fn follow(fleet: Fleet, machine: Option<MachineId>, after: u64) -> impl Stream<Item = Event> + Send {
    let commits = fleet.store().event_changes();
    let begin = (fleet, machine, after, commits);
    futures_util::stream::unfold(begin, |(fleet, machine, after, mut commits)| async move {
        loop {
            // Marked as seen before the question, so that nothing between the two is missed.
            commits.borrow_and_update();
            let filter = EventFilter {
                machine: machine.clone(),
                after,
                limit: DEFAULT_PAGE,
            };
            let events = fleet.store().events(filter).await.ok()?;
            if let Some(last) = events.last().map(|event| event.offset) {
                let events = futures_util::stream::iter(events);
                return Some((events, (fleet, machine, last, commits)));
            }
            commits.changed().await.ok()?;
        }
    })
    .flatten()
}

async fn send(socket: WebSocket, mut events: impl Stream<Item = Event> + Unpin) -> Result<(), axum::Error> {
    let (mut sink, mut incoming) = socket.split();
    loop {
        tokio::select! {
            event = events.next() => {
                let Some(event) = event else { return sink.close().await };
                let text = serde_json::to_string(&event).unwrap_or_default();
                sink.send(Message::Text(text.into())).await?;
            }
            // Nothing is expected of the client but its end.
            message = incoming.next() => if !matches!(message, Some(Ok(Message::Ping(_) | Message::Pong(_)))) {
                return sink.close().await;
            },
        }
    }
}
