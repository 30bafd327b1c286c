//! Lifecycle events: the fleet's events in Nullspace's words, as lists and as they happen.
//!
//! An event keeps one ID for ever, made of its position in the host's sequence.

use super::super::answer::Upgraded;
use super::super::error::{Failure, cut};
use super::super::extract::{Named, Path, Query};
use super::dialect::machine_id_of;
use super::time::{iso, unix_us};
use super::ws::upgrade;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ops::RangeInclusive;
use torpor_api::http::Event;
use torpor_api::{ErrorCode, ExecutionId, MachineId, ids};
use utoipa::{IntoParams, ToSchema};

/// How far back lists look.
const KEPT: u32 = 5_000;
/// Events that are read at a time for somebody who watches.
const PAGE: u32 = 500;
const DEFAULT_LIMIT: usize = 50;
const MAX_LIMIT: usize = 1000;

#[derive(Debug, Clone, Deserialize, Default, IntoParams)]
#[serde(default)]
pub(super) struct Wanted {
    offset: usize,
    limit: Option<usize>,
    order: Option<String>,
    operation: Option<String>,
    status: Option<String>,
    audience: Option<String>,
    from: Option<String>,
    to: Option<String>,
    machine_id: Option<String>,
    snapshot_id: Option<String>,
    source_machine_id: Option<String>,
    target_machine_id: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct Info {
    id: String,
    occurred_at: String,
    audience: &'static str,
    operation: &'static str,
    status: &'static str,
    actor_kind: &'static str,
    machine_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_machine_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_machine_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
    metadata: Value,
}

#[derive(Serialize, ToSchema)]
pub(super) struct List {
    events: Vec<Info>,
    offset: usize,
    limit: usize,
    has_more: bool,
}

/// Operation and status of a kind of event; `None` for what Nullspace has no word for.
fn words(kind: &str) -> Option<(&'static str, &'static str)> {
    Some(match kind {
        "machine.started" => ("create", "succeeded"),
        "machine.boot_failed" => ("create", "failed"),
        "machine.paused" => ("hibernate", "succeeded"),
        "machine.pause_failed" => ("hibernate", "failed"),
        "machine.woken" => ("resume_from_snapshot", "succeeded"),
        "machine.resume_failed" | "machine.image_refused" => ("resume_from_snapshot", "failed"),
        "machine.lease_set" => ("timeout_updated", "succeeded"),
        "machine.deleted" => ("destroy", "succeeded"),
        "machine.forked" => ("fork", "succeeded"),
        "snapshot.created" => ("snapshot_created", "succeeded"),
        "machine.adopted" | "machine.memory_lost" | "machine.memory_rolled_back" => {
            ("reconcile", "succeeded")
        }
        _ => return None,
    })
}

fn actor_kind(actor: &str) -> &'static str {
    match actor {
        "lease" | "guest" => "system",
        "recovery" => "reconcile",
        _ => "user",
    }
}

fn random(execution: &ExecutionId) -> String {
    format!("snap_{}", execution.as_str().trim_start_matches("exe_"))
}

/// A fleet's event as the one or two that it is here.
fn told(event: &Event) -> Vec<Info> {
    let Some((operation, status)) = words(&event.kind) else {
        return Vec::new();
    };
    let text = |key: &str| event.detail.get(key).and_then(Value::as_str).map(str::to_owned);
    let machine_id = event
        .execution_id
        .as_ref()
        .map_or_else(|| event.machine_id.to_string(), machine_id_of);
    let before: Option<ExecutionId> = text("previous_execution_id").and_then(|id| id.parse().ok());
    let resumes = operation == "resume_from_snapshot";
    let fork: Option<ExecutionId> = text("fork_execution_id").and_then(|id| id.parse().ok());
    let snapshot_id = match operation {
        "hibernate" if status == "succeeded" => event.execution_id.as_ref().map(random),
        "resume_from_snapshot" => before.as_ref().map(random),
        _ => text("snapshot_id"),
    };
    let info = Info {
        id: format!("evt_{}", event.offset),
        occurred_at: iso(event.at_unix_ms),
        audience: "customer",
        operation,
        status,
        actor_kind: actor_kind(&event.actor),
        snapshot_id,
        source_machine_id: match &fork {
            Some(_) => Some(machine_id.clone()),
            None => before.as_ref().filter(|_| resumes).map(machine_id_of),
        },
        target_machine_id: match &fork {
            Some(fork) => Some(machine_id_of(fork)),
            None => resumes.then(|| machine_id.clone()),
        },
        machine_id,
        reason: (event.actor == "lease").then(|| "timeout_expired".to_owned()),
        error_code: text("code"),
        error_message: text("message"),
        metadata: json!({ "actor": event.actor }),
    };
    let expired = event.actor == "lease" && matches!(operation, "hibernate" | "destroy");
    if !expired {
        return vec![info];
    }
    let timeout = Info {
        id: format!("evt_{}_timeout", event.offset),
        operation: "timeout_expired",
        status: "succeeded",
        ..info.clone()
    };
    vec![timeout, info]
}

impl Wanted {
    fn takes(&self, info: &Info) -> bool {
        let is =
            |wanted: &Option<String>, value: &str| wanted.as_deref().is_none_or(|wanted| wanted == value);
        let names = |wanted: &Option<String>, value: &Option<String>| wanted.is_none() || wanted == value;
        is(&self.operation, info.operation)
            && is(&self.status, info.status)
            && is(&self.audience, info.audience)
            && names(&self.snapshot_id, &info.snapshot_id)
            && names(&self.source_machine_id, &info.source_machine_id)
            && names(&self.target_machine_id, &info.target_machine_id)
    }

    /// From when until when, in Unix time in microseconds.
    fn window(&self) -> Result<RangeInclusive<i128>, Failure> {
        let read = |text: &Option<String>, open: i128| match text {
            None => Ok(open),
            Some(text) => unix_us(text)
                .ok_or_else(|| Failure::invalid(format!("{:?} is no time in RFC 3339", cut(text)))),
        };
        Ok(read(&self.from, i128::MIN)?..=read(&self.to, i128::MAX)?)
    }

    fn limit(&self) -> Result<usize, Failure> {
        match self.limit {
            None => Ok(DEFAULT_LIMIT),
            Some(limit) if (1..=MAX_LIMIT).contains(&limit) => Ok(limit),
            Some(limit) => Err(Failure::invalid(format!(
                "limit is {limit}, and has to be 1 to {MAX_LIMIT}"
            ))),
        }
    }
}

/// The machine that somebody asks about; events outlive machines, and know them by every ID they had.
async fn machine_of(fleet: &Fleet, text: &str) -> Result<MachineId, Failure> {
    let error = match fleet.resolve(text).await {
        Err(error) if error.code == ErrorCode::MachineNotFound => error,
        resolved => return Ok(resolved?),
    };
    for spelling in ids::spellings(text) {
        if let Ok(execution) = spelling.parse()
            && let Some(machine) = fleet.store().machine_of_events(execution).await?
        {
            return Ok(machine);
        }
        if let Ok(machine) = spelling.parse::<MachineId>()
            && !fleet.store().last_events(machine.clone(), 1).await?.is_empty()
        {
            return Ok(machine);
        }
    }
    Err(error.into())
}

async fn list_of(fleet: &Fleet, machine: Option<MachineId>, wanted: &Wanted) -> Result<Json<List>, Failure> {
    let limit = wanted.limit()?;
    let newest_first = match wanted.order.as_deref() {
        None | Some("desc") => true,
        Some("asc") => false,
        Some(_) => return Err(Failure::invalid("order is neither asc nor desc")),
    };
    let window = wanted.window()?;
    fleet.caught_up(machine.as_ref()).await;
    let events = fleet.store().latest_events(machine, KEPT).await?;
    let mut told: Vec<Info> = events
        .iter()
        .filter(|event| window.contains(&(i128::from(event.at_unix_ms) * 1000)))
        .flat_map(told)
        .filter(|info| wanted.takes(info))
        .collect();
    if newest_first {
        told.reverse();
    }
    let has_more = told.len() > wanted.offset.saturating_add(limit);
    let shown = told.into_iter().skip(wanted.offset).take(limit);
    Ok(Json(List {
        events: shown.collect(),
        offset: wanted.offset,
        limit,
        has_more,
    }))
}

pub(super) async fn of_host(
    State(fleet): State<Fleet>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<List>, Failure> {
    let machine = match &wanted.machine_id {
        Some(text) => Some(machine_of(&fleet, text).await?),
        None => None,
    };
    list_of(&fleet, machine, &wanted).await
}

pub(super) async fn of_machine(
    State(fleet): State<Fleet>,
    Path(id): Path<String>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<List>, Failure> {
    let machine = machine_of(&fleet, &id).await?;
    list_of(&fleet, Some(machine), &wanted).await
}

pub(super) async fn of_snapshot(
    State(fleet): State<Fleet>,
    Path(id): Path<String>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<List>, Failure> {
    let wanted = Wanted {
        snapshot_id: Some(id),
        ..wanted
    };
    list_of(&fleet, None, &wanted).await
}

#[derive(Debug, Clone, Deserialize)]
struct Subscribe {
    #[serde(rename = "type")]
    kind: String,
    machine_id: Option<String>,
    snapshot_id: Option<String>,
    operation: Option<String>,
    status: Option<String>,
    audience: Option<String>,
    #[serde(default)]
    live_only: bool,
    after_event_id: Option<String>,
    replay_limit: Option<usize>,
}

pub(super) async fn watch_host(
    State(fleet): State<Fleet>,
    upgraded: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Upgraded, Failure> {
    let upgrade = upgrade(upgraded)?;
    Ok(Upgraded(
        upgrade.on_upgrade(move |socket| watch(socket, fleet, None)),
    ))
}

pub(super) async fn watch_machine(
    State(fleet): State<Fleet>,
    Named(id): Named,
    upgraded: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Upgraded, Failure> {
    let upgrade = upgrade(upgraded)?;
    Ok(Upgraded(
        upgrade.on_upgrade(move |socket| watch(socket, fleet, Some(id))),
    ))
}

async fn say(socket: &mut WebSocket, frame: &Value) -> Result<(), axum::Error> {
    socket.send(Message::Text(frame.to_string().into())).await
}

async fn watch(mut socket: WebSocket, fleet: Fleet, machine: Option<MachineId>) {
    let asked = loop {
        match socket.recv().await {
            Some(Ok(Message::Text(text))) => break serde_json::from_str::<Subscribe>(text.as_str()),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Binary(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return,
        }
    };
    let asked = match asked {
        Ok(asked) if asked.kind == "subscribe" => asked,
        Ok(_) | Err(_) => {
            let frame = json!({ "type": "error", "message": "the first frame has to be a subscribe" });
            let _ = say(&mut socket, &frame).await;
            return;
        }
    };
    if let Err(message) = follow(&mut socket, &fleet, machine, asked).await {
        let _ = say(&mut socket, &json!({ "type": "error", "message": message })).await;
    }
}

/// What follows an event in the host's sequence begins after this position. An expiry is two events of one position,
/// and the first is followed by the second.
fn position(id: &str) -> Option<u64> {
    let number = id.strip_prefix("evt_")?;
    match number.strip_suffix("_timeout") {
        Some(number) => number.parse::<u64>().ok()?.checked_sub(1),
        None => number.parse().ok(),
    }
}

async fn follow(
    socket: &mut WebSocket,
    fleet: &Fleet,
    machine: Option<MachineId>,
    asked: Subscribe,
) -> Result<(), String> {
    let machine = match (&machine, &asked.machine_id) {
        (None, Some(text)) => {
            let found = machine_of(fleet, text).await;
            Some(found.map_err(|failure| failure.into_api_error().error)?)
        }
        _ => machine,
    };
    let wanted = Wanted {
        operation: asked.operation.clone(),
        status: asked.status.clone(),
        audience: asked.audience.clone(),
        snapshot_id: asked.snapshot_id.clone(),
        ..Wanted::default()
    };
    let said = |error: crate::store::StoreError| error.to_string();
    let mut changes = fleet.store().event_changes();
    changes.mark_unchanged();
    let latest = fleet
        .store()
        .latest_events(machine.clone(), KEPT)
        .await
        .map_err(said)?;
    let mut after = fleet
        .store()
        .latest_events(None, 1)
        .await
        .map_err(said)?
        .last()
        .map_or(0, |event| event.offset);
    let subscription = json!({
        "machine_id": asked.machine_id, "snapshot_id": asked.snapshot_id, "operation": asked.operation,
        "status": asked.status, "audience": asked.audience, "live_only": asked.live_only,
    });
    let hello = json!({ "type": "subscribed", "subscription": without_nulls(subscription), "reconnect_mode": "live_only" });
    let gone = |_: axum::Error| String::new();
    say(socket, &hello).await.map_err(gone)?;
    let since = asked.after_event_id.as_deref().and_then(position);
    let replayed = latest.iter().filter(|event| event.offset <= after);
    let replayed = replayed.filter(|event| since.is_none_or(|since| event.offset > since));
    let replayed: Vec<Info> = replayed
        .flat_map(told)
        .filter(|info| wanted.takes(info) && asked.after_event_id.as_ref() != Some(&info.id))
        .collect();
    if !asked.live_only || since.is_some() {
        let skipped = replayed.len().saturating_sub(asked.replay_limit.unwrap_or(100));
        for info in replayed.iter().skip(skipped) {
            say(socket, &json!({ "type": "event", "event": info }))
                .await
                .map_err(gone)?;
        }
    }
    loop {
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                after = pass_on(socket, fleet, machine.as_ref(), &wanted, after).await?;
            }
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(()),
                Some(Ok(_)) => {}
            },
        }
    }
}

/// Send what came after an event; answers where it stands then.
async fn pass_on(
    socket: &mut WebSocket,
    fleet: &Fleet,
    machine: Option<&MachineId>,
    wanted: &Wanted,
    mut after: u64,
) -> Result<u64, String> {
    loop {
        let filter = crate::store::EventFilter {
            machine: machine.cloned(),
            after,
            limit: PAGE,
        };
        let events = fleet
            .store()
            .events(filter)
            .await
            .map_err(|error| error.to_string())?;
        for event in &events {
            after = after.max(event.offset);
            for info in told(event).iter().filter(|info| wanted.takes(info)) {
                let frame = json!({ "type": "event", "event": info });
                say(socket, &frame).await.map_err(|_| String::new())?;
            }
        }
        if events.len() < usize::try_from(PAGE).unwrap_or(usize::MAX) {
            return Ok(after);
        }
    }
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(object) => object.into_iter().filter(|(_, value)| !value.is_null()).collect(),
        other => other,
    }
}
