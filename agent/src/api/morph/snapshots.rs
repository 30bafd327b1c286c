//! `/snapshot`, and snapshots and branches of an instance.
//!
//! A snapshot of an image is one of an instance of that image that has just booted. Two calls with one digest get
//! the same snapshot.

use super::super::error::Failure;
use super::super::extract::{Json as Body, Named, OptionalJson, Query};
use super::super::facade::disk_mib;
use super::super::machines::to_the_end;
use super::super::snapshots::NamedSnapshot;
use super::super::validate;
use super::images;
use super::instances::{self, Pairs, Shape, metadata_of, page};
use super::model::{Instance, Snapshot};
use crate::machine::fleet::{Fleet, ForkOrder, TemplateSnapshotOrder};
use crate::store::SnapshotFilter;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use torpor_api::http::{CreateMachine, CreateSnapshot, ForkMachine, PatchSnapshot};

/// A whole list is read in pages of this size.
const PAGE: u32 = 1000;
const DEFAULT_IMAGE: &str = "morphvm-minimal";

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct OfImage {
    image_id: Option<String>,
    vcpus: Option<u8>,
    memory: Option<u32>,
    disk_size: Option<u32>,
    digest: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    ttl_seconds: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct OfInstance {
    digest: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    ttl_seconds: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ttl {
    ttl_seconds: Option<u64>,
}

#[derive(Serialize)]
pub(super) struct List {
    data: Vec<Snapshot>,
}

fn value<'a>(pairs: &'a Pairs, key: &str) -> Option<&'a str> {
    let found = pairs.iter().find(|(name, _)| name == key);
    found.map(|(_, value)| value.as_str())
}

async fn all(fleet: &Fleet, pairs: &Pairs) -> Result<Vec<Snapshot>, Failure> {
    let metadata = metadata_of(pairs);
    let (mut after, mut snapshots) = (None, Vec::new());
    loop {
        let filter = SnapshotFilter {
            digest: value(pairs, "digest").map(str::to_owned),
            machine: None,
            after,
            limit: PAGE,
        };
        let page = fleet.snapshots(filter).await?;
        after = page.last().map(|snapshot| snapshot.id.clone());
        let last = page.len() < usize::try_from(PAGE).unwrap_or(usize::MAX);
        let wanted = page.into_iter().filter(|snapshot| {
            metadata
                .iter()
                .all(|(key, value)| snapshot.metadata.get(key) == Some(value))
        });
        snapshots.extend(wanted.map(Snapshot::from));
        if last {
            return Ok(snapshots);
        }
    }
}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    Query(pairs): Query<Pairs>,
) -> Result<Json<List>, Failure> {
    let data = all(&fleet, &pairs).await?;
    Ok(Json(List { data }))
}

pub(super) async fn list_pages(
    State(fleet): State<Fleet>,
    Query(pairs): Query<Pairs>,
) -> Result<Json<Value>, Failure> {
    let snapshots = all(&fleet, &pairs).await?;
    page("snapshots", snapshots, &pairs).map(Json)
}

pub(super) async fn create(
    State(fleet): State<Fleet>,
    OptionalJson(body): OptionalJson<OfImage>,
) -> Result<(StatusCode, Json<Snapshot>), Failure> {
    let template = images::template(&fleet, body.image_id.as_deref().unwrap_or(DEFAULT_IMAGE)).await?;
    let shape = Shape {
        vcpus: body.vcpus,
        memory: body.memory,
        disk_size: body.disk_size,
    };
    let machine = CreateMachine {
        vcpus: shape.vcpus(),
        mem_mib: shape.memory(),
        disk_mib: disk_mib(&fleet, &template, shape.disk_size).await,
        template,
        ..CreateMachine::default()
    };
    let snapshot = CreateSnapshot {
        digest: body.digest,
        metadata: body.metadata.unwrap_or_default(),
        retention_seconds: body.ttl_seconds,
        ..CreateSnapshot::default()
    };
    validate::create(&machine)?;
    validate::snapshot(&snapshot)?;
    let order = TemplateSnapshotOrder {
        machine,
        snapshot: snapshot.into(),
    };
    let snapshot = to_the_end(async move { Ok(fleet.snapshot_template(order).await?) }).await?;
    Ok((StatusCode::CREATED, Json(snapshot.into())))
}

pub(super) async fn of_instance(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(pairs): Query<Pairs>,
    OptionalJson(body): OptionalJson<OfInstance>,
) -> Result<(StatusCode, Json<Snapshot>), Failure> {
    let order = CreateSnapshot {
        digest: body.digest.or_else(|| value(&pairs, "digest").map(str::to_owned)),
        metadata: body.metadata.unwrap_or_default(),
        retention_seconds: body.ttl_seconds,
        ..CreateSnapshot::default()
    };
    validate::snapshot(&order)?;
    let snapshot = to_the_end(async move { Ok(fleet.snapshot(&id, order.into()).await?) }).await?;
    Ok((StatusCode::CREATED, Json(snapshot.into())))
}

pub(super) async fn branch(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(pairs): Query<Pairs>,
) -> Result<Json<Value>, Failure> {
    let count = instances::number(&pairs, "count", 1)?;
    let body = ForkMachine {
        count: u32::try_from(count).unwrap_or(u32::MAX),
        keep_snapshot: true,
        ..ForkMachine::default()
    };
    validate::fork(&body)?;
    let order = ForkOrder {
        body,
        idempotency: None,
    };
    let forked = to_the_end(async move { Ok(fleet.fork(&id, order).await?) }).await?;
    let instances: Vec<Instance> = forked.machines.into_iter().map(Instance::from).collect();
    Ok(Json(json!({
        "snapshot": forked.snapshot.map(Snapshot::from),
        "instances": instances,
    })))
}

pub(super) async fn show(NamedSnapshot(snapshot): NamedSnapshot) -> Json<Snapshot> {
    Json(snapshot.into())
}

pub(super) async fn delete(
    State(fleet): State<Fleet>,
    NamedSnapshot(snapshot): NamedSnapshot,
) -> Result<StatusCode, Failure> {
    to_the_end(async move { Ok(fleet.delete_snapshot(&snapshot.id).await?) }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn change(
    fleet: &Fleet,
    before: torpor_api::http::Snapshot,
    patch: PatchSnapshot,
) -> Result<Json<Snapshot>, Failure> {
    validate::patch_snapshot(&patch)?;
    Ok(Json(fleet.patch_snapshot(&before.id, patch).await?.into()))
}

pub(super) async fn set_metadata(
    State(fleet): State<Fleet>,
    NamedSnapshot(snapshot): NamedSnapshot,
    Body(metadata): Body<BTreeMap<String, String>>,
) -> Result<Json<Snapshot>, Failure> {
    let patch = PatchSnapshot {
        metadata: Some(metadata),
        ..PatchSnapshot::default()
    };
    change(&fleet, snapshot, patch).await
}

pub(super) async fn set_ttl(
    State(fleet): State<Fleet>,
    NamedSnapshot(snapshot): NamedSnapshot,
    Body(ttl): Body<Ttl>,
) -> Result<Json<Snapshot>, Failure> {
    let patch = PatchSnapshot {
        retention_seconds: Some(ttl.ttl_seconds),
        ..PatchSnapshot::default()
    };
    change(&fleet, snapshot, patch).await
}
