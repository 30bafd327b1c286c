//! `/v1/snapshots`, and snapshots and forks of a machine. A paused machine's memory is a snapshot, too: of that
//! machine, for as long as it is paused, and for nobody else.

use super::super::answer::{Created, NoContent};
use super::super::error::{Failure, cut};
use super::super::extract::{Named, OptionalJson, Path, Query};
use super::super::machines::{idempotency, to_the_end};
use super::dialect::machine_id_of;
use super::machines::{Nothing, metadata_filter, pause_snapshot};
use super::model::{Info, SnapshotInfo, Status};
use super::time::iso;
use crate::machine::fleet::{Fleet, ForkOrder, MachineQuery, SnapshotOrder};
use crate::store::SnapshotFilter;
use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::Deserialize;
use std::collections::BTreeMap;
use torpor_api::http::{Machine, MachineStatus, Snapshot};
use torpor_api::{ErrorCode, MachineId, SnapshotId};
use utoipa::IntoParams;

/// A whole list is read in pages of this size.
const PAGE: u32 = 1000;

#[derive(Deserialize, IntoParams)]
pub(super) struct Wanted {
    machine_id: Option<String>,
    metadata: Option<String>,
}

impl From<Snapshot> for SnapshotInfo {
    fn from(snapshot: Snapshot) -> Self {
        Self {
            id: snapshot.id.to_string(),
            machine_id: snapshot
                .execution_id
                .as_ref()
                .map_or_else(|| snapshot.machine_id.to_string(), machine_id_of),
            size_bytes: snapshot.size_bytes,
            created_at: iso(snapshot.created_unix_ms),
        }
    }
}

fn not_found(text: &str) -> Failure {
    Failure::new(
        ErrorCode::SnapshotNotFound,
        format!("no snapshot {:?}", cut(text)),
    )
}

/// The snapshot of a pause that has this ID, while that pause lasts.
async fn of_pause(fleet: &Fleet, id: &str) -> Result<Option<SnapshotInfo>, Failure> {
    let machine = match fleet.resolve(id).await {
        Ok(machine) => fleet.view(&machine).await?,
        Err(error) if error.code == ErrorCode::MachineNotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(paused_as(&machine).filter(|snapshot| snapshot.id == id))
}

/// A pause is its machine's own.
pub(super) async fn refuse_pause(fleet: &Fleet, id: &str) -> Result<(), Failure> {
    match of_pause(fleet, id).await? {
        None => Ok(()),
        Some(pause) => {
            let message = format!(
                "snapshot {id} is the memory of machine {}, which is paused",
                pause.machine_id
            );
            Err(Failure::new(ErrorCode::SnapshotInUse, message))
        }
    }
}

fn paused_as(machine: &Machine) -> Option<SnapshotInfo> {
    let paused = Status::of(machine) == Status::Paused;
    pause_snapshot(machine).filter(|_| paused)
}

pub(super) async fn create(
    State(fleet): State<Fleet>,
    Named(id): Named,
    headers: HeaderMap,
    OptionalJson(Nothing {}): OptionalJson<Nothing>,
) -> Result<Created<SnapshotInfo>, Failure> {
    let order = SnapshotOrder {
        idempotency: idempotency(&headers, id.as_str().as_bytes())?,
        ..SnapshotOrder::default()
    };
    let snapshot = to_the_end(async move { Ok(fleet.snapshot(&id, order).await?) }).await?;
    Ok(Created(snapshot.into()))
}

pub(super) async fn fork(
    State(fleet): State<Fleet>,
    Named(id): Named,
    headers: HeaderMap,
    OptionalJson(Nothing {}): OptionalJson<Nothing>,
) -> Result<Created<Info>, Failure> {
    let order = ForkOrder {
        idempotency: idempotency(&headers, id.as_str().as_bytes())?,
        ..ForkOrder::default()
    };
    let forked = to_the_end(async move { Ok(fleet.fork(&id, order).await?) }).await?;
    let machine = forked.machines.into_iter().next();
    let machine = machine.ok_or_else(|| Failure::new(ErrorCode::SnapshotFailed, "the fork is gone again"))?;
    Ok(Created(machine.into()))
}

pub(super) async fn show(
    State(fleet): State<Fleet>,
    Path(id): Path<String>,
) -> Result<Json<SnapshotInfo>, Failure> {
    match fleet.find_snapshot(&id).await {
        Ok(snapshot) => Ok(Json(snapshot.into())),
        Err(error) if error.code == ErrorCode::SnapshotNotFound => of_pause(&fleet, &id)
            .await?
            .map(Json)
            .ok_or_else(|| not_found(&id)),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn delete(State(fleet): State<Fleet>, Path(id): Path<String>) -> Result<NoContent, Failure> {
    refuse_pause(&fleet, &id).await?;
    let id: SnapshotId = id.parse().map_err(|_| not_found(&id))?;
    to_the_end(async move { Ok(fleet.delete_snapshot(&id).await?) }).await?;
    Ok(NoContent)
}

/// Snapshots outlive their machine, whose ID then resolves to nothing.
async fn source_of(fleet: &Fleet, text: &str) -> Result<Option<MachineId>, Failure> {
    match fleet.resolve(text).await {
        Ok(id) => Ok(Some(id)),
        Err(error) if error.code == ErrorCode::MachineNotFound => Ok(text.parse().ok()),
        Err(error) => Err(error.into()),
    }
}

async fn reusable(
    fleet: &Fleet,
    machine: Option<&MachineId>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<SnapshotInfo>, Failure> {
    let (mut after, mut found) = (None, Vec::new());
    loop {
        let filter = SnapshotFilter {
            digest: None,
            machine: machine.cloned(),
            after,
            limit: PAGE,
        };
        let page = fleet.snapshots(filter).await?;
        after = page.last().map(|snapshot| snapshot.id.clone());
        let last = page.len() < usize::try_from(PAGE).unwrap_or(usize::MAX);
        let has = |snapshot: &Snapshot| {
            let mut wanted = metadata.iter();
            wanted.all(|(key, value)| snapshot.metadata.get(key) == Some(value))
        };
        found.extend(page.into_iter().filter(has).map(SnapshotInfo::from));
        if last {
            return Ok(found);
        }
    }
}

async fn pauses(fleet: &Fleet, machine: Option<&MachineId>) -> Result<Vec<SnapshotInfo>, Failure> {
    if let Some(id) = machine {
        return match fleet.view(id).await {
            Ok(machine) => Ok(paused_as(&machine).into_iter().collect()),
            Err(error) if error.code == ErrorCode::MachineNotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        };
    }
    let query = MachineQuery {
        statuses: vec![MachineStatus::Paused],
        ..MachineQuery::default()
    };
    let (mut after, mut found) = (None, Vec::new());
    loop {
        let page = fleet.list(&query, after, PAGE).await?;
        after = page.last().map(|machine| machine.id.clone());
        let last = page.len() < usize::try_from(PAGE).unwrap_or(usize::MAX);
        found.extend(page.iter().filter_map(paused_as));
        if last {
            return Ok(found);
        }
    }
}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<Vec<SnapshotInfo>>, Failure> {
    let metadata = metadata_filter(wanted.metadata.as_deref())?;
    let machine = match &wanted.machine_id {
        None => None,
        Some(text) => match source_of(&fleet, text).await? {
            Some(id) => Some(id),
            None => return Ok(Json(Vec::new())),
        },
    };
    let mut found = reusable(&fleet, machine.as_ref(), &metadata).await?;
    if metadata.is_empty() {
        found.extend(pauses(&fleet, machine.as_ref()).await?);
    }
    Ok(Json(found))
}
