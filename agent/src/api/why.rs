//! `/v1/machines/{id}/why`: why a machine is awake or asleep, from its events. Never wakes.

use super::error::Failure;
use super::extract::Named;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use torpor_api::http::{Event, MachineStatus, Why};

/// How far back the cause is looked for.
const LOOK_BACK: u32 = 200;

/// Events that change whether a machine is awake.
const CAUSES: &[&str] = &[
    "machine.started",
    "machine.woken",
    "machine.adopted",
    "machine.pause_cancelled",
    "machine.pause_failed",
    "machine.paused",
    "machine.resume_failed",
    "machine.image_refused",
    "machine.memory_rolled_back",
    "machine.memory_lost",
    "machine.stopped",
    "machine.rebooted",
    "machine.boot_failed",
];

pub(super) async fn why(State(fleet): State<Fleet>, Named(id): Named) -> Result<Json<Why>, Failure> {
    let machine = fleet.view(&id).await?;
    let events = fleet.store().last_events(id.clone(), LOOK_BACK).await?;
    let event = events
        .into_iter()
        .find(|event| CAUSES.contains(&event.kind.as_str()));
    let hold = match machine.status {
        MachineStatus::Running => fleet.hold_of(&id).await,
        _ => None,
    };
    Ok(Json(Why {
        because: event
            .as_ref()
            .map_or_else(|| "it was just created".to_owned(), sentence),
        machine_id: id.clone(),
        status: machine.status,
        event,
        lease: machine.lease,
        activity: fleet.activity_of(&id, &machine.activity),
        min_awake_remaining_ms: fleet.min_awake_remaining_ms(&id, &machine.activity),
        at_work: fleet.is_at_work(&id),
        hold,
    }))
}

/// What happened, by whom, and what for.
fn sentence(event: &Event) -> String {
    let text = |pointer: &str| {
        event
            .detail
            .pointer(pointer)
            .and_then(|value| value.as_str())
            .unwrap_or_default()
    };
    let what = match event.kind.as_str() {
        "machine.started" => "booted",
        "machine.woken" => "woken",
        "machine.adopted" => "found running when torpord started",
        "machine.pause_cancelled" => "kept awake in the middle of a pause",
        "machine.pause_failed" => "still awake, because a pause failed",
        "machine.paused" if event.actor == "room" => "put to sleep to make room for another machine",
        "machine.paused" => "put to sleep",
        "machine.resume_failed" => "still asleep, because a wake failed",
        "machine.image_refused" => "still asleep, because its memory was refused",
        "machine.memory_rolled_back" => "asleep as it was at its last pause, because its VMM was lost",
        "machine.memory_lost" => "off, because its memory was lost",
        "machine.stopped" => "off, because it powered itself off",
        "machine.rebooted" => "rebooting",
        _ => "off, because it did not boot",
    };
    let mut sentence = format!("{what} by {}", event.actor);
    for (word, pointer) in [
        ("", "/cause/operation"),
        ("", "/cause/method"),
        ("", "/cause/path"),
        ("from ", "/cause/client"),
        ("with ", "/cause/user_agent"),
        ("because ", "/message"),
        ("because ", "/error"),
    ] {
        let value = text(pointer);
        if !value.is_empty() {
            sentence.push_str(&format!(" {word}{value}"));
        }
    }
    if let Some(port) = event
        .detail
        .pointer("/cause/port")
        .and_then(serde_json::Value::as_u64)
    {
        sentence.push_str(&format!(" to port {port}"));
    }
    sentence
}
