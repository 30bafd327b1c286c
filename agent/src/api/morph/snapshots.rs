//! `/snapshot`, and snapshots and branches of an instance.
//!
//! A snapshot of an image is one of an instance of that image that has just booted. Two calls with one digest get
//! the same snapshot.

use super::super::answer::{Created, NoContent};
use super::super::error::Failure;
use super::super::extract::{Json as Body, Named, OptionalJson, Query};
use super::super::facade::disk_mib;
use super::super::machines::to_the_end;
use super::super::snapshots::NamedSnapshot;
use super::super::validate;
use super::images;
use super::instances::{self, Pairs, Place, Shape, metadata_of, page};
use super::model::{Instance, Snapshot};
use crate::machine::fleet::{Fleet, ForkOrder, TemplateSnapshotOrder};
use crate::store::SnapshotFilter;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use torpor_api::http::{CreateMachine, CreateSnapshot, ForkMachine, PatchSnapshot};
use utoipa::{IntoParams, ToSchema};

/// A whole list is read in pages of this size.
const PAGE: u32 = 1000;
const DEFAULT_IMAGE: &str = "morphvm-minimal";

#[derive(Deserialize, Default, ToSchema)]
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

#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct OfInstance {
    digest: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    ttl_seconds: Option<u64>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewSnapshotTtl)]
pub(super) struct Ttl {
    ttl_seconds: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct List {
    data: Vec<Snapshot>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct SnapshotPage {
    snapshots: Vec<Snapshot>,
    #[serde(flatten)]
    place: Place,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Branched {
    snapshot: Option<Snapshot>,
    instances: Vec<Instance>,
}

/// What a list is narrowed by.
#[derive(IntoParams)]
#[expect(dead_code, reason = "said in the documents, and read one by one")]
pub(super) struct Wanted {
    digest: Option<String>,
    /// `metadata[key]=value`, all of which have to be there.
    #[param(style = DeepObject)]
    metadata: Option<BTreeMap<String, String>>,
}

/// Likewise, and which page of it.
#[derive(IntoParams)]
#[expect(dead_code, reason = "said in the documents, and read one by one")]
pub(super) struct WantedPage {
    /// From 1.
    #[param(minimum = 1, maximum = 100_000)]
    page: Option<usize>,
    #[param(minimum = 1, maximum = 100_000)]
    limit: Option<usize>,
    digest: Option<String>,
    /// `metadata[key]=value`, all of which have to be there.
    #[param(style = DeepObject)]
    metadata: Option<BTreeMap<String, String>>,
}

#[derive(IntoParams)]
#[expect(dead_code, reason = "said in the documents, and read one by one")]
pub(super) struct OfDigest {
    digest: Option<String>,
}

#[derive(IntoParams)]
#[expect(dead_code, reason = "said in the documents, and read one by one")]
pub(super) struct HowMany {
    #[param(minimum = 1, maximum = 64)]
    count: Option<usize>,
}

fn value<'a>(pairs: &'a [(String, String)], key: &str) -> Option<&'a str> {
    let found = pairs.iter().find(|(name, _)| name == key);
    found.map(|(_, value)| value.as_str())
}

async fn all(fleet: &Fleet, pairs: &[(String, String)]) -> Result<Vec<Snapshot>, Failure> {
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
    Query(Pairs(pairs, _)): Query<Pairs<Wanted>>,
) -> Result<Json<List>, Failure> {
    let data = all(&fleet, &pairs).await?;
    Ok(Json(List { data }))
}

pub(super) async fn list_pages(
    State(fleet): State<Fleet>,
    Query(Pairs(pairs, _)): Query<Pairs<WantedPage>>,
) -> Result<Json<SnapshotPage>, Failure> {
    let (snapshots, place) = page(all(&fleet, &pairs).await?, &pairs)?;
    Ok(Json(SnapshotPage { snapshots, place }))
}

pub(super) async fn create(
    State(fleet): State<Fleet>,
    OptionalJson(body): OptionalJson<OfImage>,
) -> Result<Created<Snapshot>, Failure> {
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
    Ok(Created(snapshot.into()))
}

pub(super) async fn of_instance(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(Pairs(pairs, _)): Query<Pairs<OfDigest>>,
    OptionalJson(body): OptionalJson<OfInstance>,
) -> Result<Created<Snapshot>, Failure> {
    let order = CreateSnapshot {
        digest: body.digest.or_else(|| value(&pairs, "digest").map(str::to_owned)),
        metadata: body.metadata.unwrap_or_default(),
        retention_seconds: body.ttl_seconds,
        ..CreateSnapshot::default()
    };
    validate::snapshot(&order)?;
    let snapshot = to_the_end(async move { Ok(fleet.snapshot(&id, order.into()).await?) }).await?;
    Ok(Created(snapshot.into()))
}

pub(super) async fn branch(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(Pairs(pairs, _)): Query<Pairs<HowMany>>,
) -> Result<Json<Branched>, Failure> {
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
    Ok(Json(Branched {
        snapshot: forked.snapshot.map(Snapshot::from),
        instances: forked.machines.into_iter().map(Instance::from).collect(),
    }))
}

pub(super) async fn show(NamedSnapshot(snapshot): NamedSnapshot) -> Json<Snapshot> {
    Json(snapshot.into())
}

pub(super) async fn delete(
    State(fleet): State<Fleet>,
    NamedSnapshot(snapshot): NamedSnapshot,
) -> Result<NoContent, Failure> {
    to_the_end(async move { Ok(fleet.delete_snapshot(&snapshot.id).await?) }).await?;
    Ok(NoContent)
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
