//! `/v1/machines/{id}`: listed, shown, hibernated, resumed, timed, destroyed.

use super::super::answer::NoContent;
use super::super::error::{Failure, cut};
use super::super::extract::{Json as Body, Named, OptionalJson, Query};
use super::create::lease;
use super::dialect::{machine_id, pause_snapshot_id};
use super::model::{Info, Shown, SnapshotInfo, Status, Timeout, TimeoutAction, stored_metadata};
use super::time::iso;
use crate::machine::driver::PauseOrder;
use crate::machine::fleet::{Fleet, MachineQuery, PolicyRule};
use crate::store::MachineFilter;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use torpor_api::http::{Machine, ResumeFrom};
use torpor_api::{ErrorCode, MachineId};
use utoipa::{IntoParams, ToSchema};

const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;

#[derive(Deserialize, IntoParams)]
pub(super) struct Page {
    state: Option<String>,
    template: Option<String>,
    metadata: Option<String>,
    limit: Option<u32>,
    next_token: Option<String>,
    fields: Option<String>,
}

#[derive(Deserialize, IntoParams)]
pub(super) struct Fields {
    fields: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct List {
    items: Vec<Shown>,
    has_next: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_token: Option<MachineId>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SetTimeout {
    timeout_ms: u64,
    timeout_action: Option<TimeoutAction>,
}

/// A body in which nothing needs to be said.
#[derive(Deserialize, Default, ToSchema)]
pub(super) struct Nothing {}

impl Page {
    fn states(&self) -> Result<Vec<Status>, Failure> {
        let names = self.state.iter().flat_map(|names| names.split(','));
        let parse = |name: &str| {
            Status::parse(name).ok_or_else(|| Failure::invalid(format!("state {:?} is none", cut(name))))
        };
        names.filter(|name| !name.is_empty()).map(parse).collect()
    }

    fn filter(&self) -> Result<MachineFilter, Failure> {
        Ok(MachineFilter {
            template: self.template.clone(),
            metadata: metadata_filter(self.metadata.as_deref())?,
        })
    }
}

/// The pairs of texts that stand for a JSON object of wanted metadata.
pub(super) fn metadata_filter(text: Option<&str>) -> Result<BTreeMap<String, String>, Failure> {
    let wanted: Option<Map<String, Value>> = text
        .map(serde_json::from_str)
        .transpose()
        .map_err(|error| Failure::invalid(format!("metadata is no JSON object: {error}")))?;
    let texts = wanted.unwrap_or_default().into_iter();
    // One pair at a time: what is stored of a whole object has no part in finding it.
    let metadata = texts.flat_map(|(key, value)| {
        let one = Map::from_iter([(key.clone(), value)]);
        stored_metadata(&one).remove_entry(&key)
    });
    Ok(metadata.collect())
}

/// The machine, or those of its fields that were asked for.
fn shown(machine: Machine, fields: Option<&str>) -> Shown {
    let full = json!(Info::from(machine));
    let (Some(fields), Value::Object(full)) = (fields, &full) else {
        return Shown(full);
    };
    let asked: Vec<&str> = fields.split(',').map(str::trim).collect();
    let kept = full.iter().filter(|(key, _)| asked.contains(&key.as_str()));
    Shown(kept.map(|(key, value)| (key.clone(), value.clone())).collect())
}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    Query(page): Query<Page>,
) -> Result<Json<List>, Failure> {
    let limit = page.limit.unwrap_or(DEFAULT_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Failure::invalid(format!(
            "limit is {limit}, and has to be 1 to {MAX_PAGE}"
        )));
    }
    let after = page.next_token.as_deref().map(str::parse).transpose();
    let after = after.map_err(|_| Failure::invalid("next_token is none of ours"))?;
    let states = page.states()?;
    let query = MachineQuery {
        filter: page.filter()?,
        statuses: states
            .iter()
            .flat_map(|state| state.candidates())
            .copied()
            .collect(),
    };
    let mut machines = fleet.list(&query, after, limit + 1).await?;
    let most = usize::try_from(limit).unwrap_or(usize::MAX);
    let has_next = machines.len() > most;
    machines.truncate(most);
    let next_token = machines
        .last()
        .filter(|_| has_next)
        .map(|machine| machine.id.clone());
    let wanted = |machine: &Machine| {
        let state = Status::of(machine);
        if states.is_empty() {
            state != Status::Destroyed
        } else {
            states.contains(&state)
        }
    };
    let items = machines.into_iter().filter(wanted);
    Ok(Json(List {
        items: items
            .map(|machine| shown(machine, page.fields.as_deref()))
            .collect(),
        has_next,
        next_token,
    }))
}

pub(super) async fn show(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(fields): Query<Fields>,
) -> Result<Json<Shown>, Failure> {
    let machine = fleet.view(&id).await?;
    Ok(Json(shown(machine, fields.fields.as_deref())))
}

pub(super) async fn destroy(State(fleet): State<Fleet>, Named(id): Named) -> Result<NoContent, Failure> {
    fleet.delete(&id, PauseOrder::by("api")).await?;
    Ok(NoContent)
}

/// What a paused machine holds, as a snapshot.
pub(super) fn pause_snapshot(machine: &Machine) -> Option<SnapshotInfo> {
    Some(SnapshotInfo {
        id: pause_snapshot_id(machine)?,
        machine_id: machine_id(machine),
        size_bytes: u64::from(machine.mem_mib) << 20,
        created_at: iso(machine.since_unix_ms),
    })
}

pub(super) async fn hibernate(
    State(fleet): State<Fleet>,
    Named(id): Named,
    OptionalJson(Nothing {}): OptionalJson<Nothing>,
) -> Result<Json<SnapshotInfo>, Failure> {
    fleet.pause(&id, PauseOrder::by("api")).await?;
    let machine = fleet.view(&id).await?;
    let snapshot = pause_snapshot(&machine);
    snapshot
        .map(Json)
        .ok_or_else(|| Failure::new(ErrorCode::MachineNotReady, "the machine never ran"))
}

pub(super) async fn resume(
    State(fleet): State<Fleet>,
    Named(id): Named,
    OptionalJson(Nothing {}): OptionalJson<Nothing>,
) -> Result<Json<Info>, Failure> {
    fleet.resume(&id, ResumeFrom::Memory).await?;
    Ok(Json(fleet.view(&id).await?.into()))
}

pub(super) async fn set_timeout(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<SetTimeout>,
) -> Result<Json<Timeout>, Failure> {
    let before = fleet
        .view(&id)
        .await?
        .lease
        .map(|lease| lease.policy.action.into());
    let action = body.timeout_action.or(before).unwrap_or(TimeoutAction::Destroy);
    let policy = lease(body.timeout_ms, action)?;
    fleet
        .set_lease(&id, Some(policy), PolicyRule::DestroyOrWake)
        .await?;
    let lease = fleet.view(&id).await?.lease;
    lease
        .as_ref()
        .map(|lease| Json(Timeout::from(lease)))
        .ok_or_else(|| {
            Failure::new(
                ErrorCode::TransitionInProgress,
                "the timeout was taken away meanwhile",
            )
        })
}
