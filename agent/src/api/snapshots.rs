//! `/v1/snapshots`, and snapshots and forks of a machine.

use super::answer::{Created, NoContent};
use super::describe::{Description, Taken};
use super::error::{Failure, cut};
use super::extract::{Json as Body, Named, OptionalJson, Path, Query};
use super::machines::{idempotency, to_the_end};
use super::validate;
use crate::machine::fleet::{Fleet, ForkOrder, SnapshotOrder, check_lease_and_wake};
use crate::store::SnapshotFilter;
use axum::Json;
use axum::extract::{FromRequestParts, State};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use serde::Deserialize;
use torpor_api::http::{CreateSnapshot, ForkMachine, Forked, PatchSnapshot, Snapshot, SnapshotList};
use torpor_api::{MachineId, SnapshotId, ids, limits};
use utoipa::IntoParams;

const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;

/// What `GET /v1/snapshots` can be asked for.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    digest: Option<String>,
    machine_id: Option<String>,
    after: Option<SnapshotId>,
    limit: Option<u32>,
}

/// The snapshot that `{id}` names: an ID or a name.
pub(super) struct NamedSnapshot(pub(super) Snapshot);

impl FromRequestParts<Fleet> for NamedSnapshot {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, fleet: &Fleet) -> Result<Self, Failure> {
        let Path(text) = Path::<String>::from_request_parts(parts, fleet).await?;
        // Another API's spelling of an ID is the same ID.
        let id = ids::spellings(&text)
            .into_iter()
            .find(|id| id.starts_with("snap_"));
        Ok(Self(fleet.find_snapshot(id.as_ref().unwrap_or(&text)).await?))
    }
}

impl Taken for NamedSnapshot {
    fn describe(_: &mut Description) {}
}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<SnapshotList>, Failure> {
    let machine = match &wanted.machine_id {
        None => None,
        Some(text) => Some(source_of(&fleet, text).await?),
    };
    page(&fleet, wanted, machine).await
}

pub(super) async fn of_machine(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(wanted): Query<Wanted>,
) -> Result<Json<SnapshotList>, Failure> {
    if wanted.machine_id.is_some() {
        return Err(Failure::invalid(
            "the path names the machine, machine_id does not",
        ));
    }
    page(&fleet, wanted, Some(id)).await
}

/// Snapshots outlive their machine, whose ID then resolves to nothing.
async fn source_of(fleet: &Fleet, text: &str) -> Result<MachineId, Failure> {
    match text.parse() {
        Ok(id) => Ok(id),
        Err(_) => Ok(fleet.resolve(text).await?),
    }
}

async fn page(
    fleet: &Fleet,
    wanted: Wanted,
    machine: Option<MachineId>,
) -> Result<Json<SnapshotList>, Failure> {
    let limit = wanted.limit.unwrap_or(DEFAULT_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Failure::invalid(format!(
            "limit is {limit}, and has to be 1 to {MAX_PAGE}"
        )));
    }
    if let Some(digest) = wanted
        .digest
        .as_ref()
        .filter(|digest| digest.len() > limits::MAX_DIGEST)
    {
        return Err(Failure::invalid(format!("digest {:?} is too long", cut(digest))));
    }
    let filter = SnapshotFilter {
        digest: wanted.digest,
        machine,
        after: wanted.after,
        // One more than asked for tells whether there is a next page.
        limit: limit + 1,
    };
    let mut snapshots = fleet.snapshots(filter).await?;
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = snapshots.len() > shown;
    snapshots.truncate(shown);
    let next = snapshots
        .last()
        .filter(|_| more)
        .map(|snapshot| snapshot.id.clone());
    Ok(Json(SnapshotList { snapshots, next }))
}

pub(super) async fn create(
    State(fleet): State<Fleet>,
    Named(id): Named,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<CreateSnapshot>,
) -> Result<Created<Snapshot>, Failure> {
    validate::snapshot(&body)?;
    let said = serde_json::to_vec(&(&id, &body)).unwrap_or_default();
    let idempotency = idempotency(&headers, &said)?;
    let order = SnapshotOrder { body, idempotency };
    let snapshot = to_the_end(async move { Ok(fleet.snapshot(&id, order).await?) }).await?;
    Ok(Created(snapshot))
}

pub(super) async fn fork(
    State(fleet): State<Fleet>,
    Named(id): Named,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ForkMachine>,
) -> Result<Created<Forked>, Failure> {
    validate::fork(&body)?;
    let source = fleet.view(&id).await?;
    let lease = body.lease.or(source.lease.map(|lease| lease.policy));
    if let Some(wake) = body.wake {
        check_lease_and_wake(lease, wake)?;
    }
    let said = serde_json::to_vec(&(&id, &body)).unwrap_or_default();
    let idempotency = idempotency(&headers, &said)?;
    let order = ForkOrder { body, idempotency };
    let forked = to_the_end(async move { Ok(fleet.fork(&id, order).await?) }).await?;
    Ok(Created(forked))
}

pub(super) async fn show(NamedSnapshot(snapshot): NamedSnapshot) -> Json<Snapshot> {
    Json(snapshot)
}

pub(super) async fn change(
    State(fleet): State<Fleet>,
    NamedSnapshot(snapshot): NamedSnapshot,
    Body(patch): Body<PatchSnapshot>,
) -> Result<Json<Snapshot>, Failure> {
    validate::patch_snapshot(&patch)?;
    Ok(Json(fleet.patch_snapshot(&snapshot.id, patch).await?))
}

pub(super) async fn delete(
    State(fleet): State<Fleet>,
    NamedSnapshot(snapshot): NamedSnapshot,
) -> Result<NoContent, Failure> {
    to_the_end(async move { Ok(fleet.delete_snapshot(&snapshot.id).await?) }).await?;
    Ok(NoContent)
}
