//! `/instance`: started, listed, shown, paused, resumed, stopped.

use super::super::answer::{Created, NoContent};
use super::super::error::Failure;
use super::super::extract::{Named, OptionalJson, Path, Query};
use super::super::machines::to_the_end;
use super::super::validate;
use super::images;
use super::model::Instance;
use super::policy::{Ttl, TtlAction};
use crate::machine::driver::PauseOrder;
use crate::machine::fleet::{CreateOrder, Fleet, MachineQuery, PolicyRule, Reshape};
use crate::store::MachineFilter;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use torpor_api::http::{CreateMachine, Machine, MachineStatus, ResumeFrom, WakePolicy};
use torpor_api::{ErrorCode, MachineId, ids};
use utoipa::openapi::path::{Parameter, ParameterIn};
use utoipa::{IntoParams, ToSchema};

/// A whole list is read in pages of this size.
const PAGE: u32 = 1000;
/// What an instance has that is started from an image and not from a snapshot, which has a shape.
const DEFAULT_VCPUS: u8 = 1;
const DEFAULT_MEMORY_MIB: u32 = 512;

/// Body of a start. The SDK sends every key, `null` where nothing was said.
#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Start {
    snapshot_id: Option<String>,
    metadata: Option<BTreeMap<String, String>>,
    ttl_seconds: Option<u64>,
    ttl_action: Option<TtlAction>,
}

/// The shape that is asked for, if one is.
#[derive(Clone, Copy, Default)]
pub(super) struct Shape {
    pub(super) vcpus: Option<u8>,
    pub(super) memory: Option<u32>,
    pub(super) disk_size: Option<u32>,
}

impl Shape {
    pub(super) fn vcpus(self) -> u8 {
        self.vcpus.unwrap_or(DEFAULT_VCPUS)
    }

    pub(super) fn memory(self) -> u32 {
        self.memory.unwrap_or(DEFAULT_MEMORY_MIB)
    }
}

/// A query as keys and values, several of which begin with `metadata[`; `P` says what it may hold.
#[derive(Deserialize)]
#[serde(transparent)]
pub(super) struct Pairs<P>(
    pub(super) Vec<(String, String)>,
    #[serde(skip)] pub(super) PhantomData<P>,
);

impl<P: IntoParams> IntoParams for Pairs<P> {
    fn into_params(within: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        P::into_params(within)
    }
}

/// What a list is narrowed by.
#[derive(IntoParams)]
#[expect(dead_code, reason = "said in the documents, and read one by one")]
pub(super) struct Narrowed {
    /// `metadata[key]=value`, all of which have to be there.
    #[param(style = DeepObject)]
    metadata: Option<BTreeMap<String, String>>,
}

/// Likewise, and which page of it.
#[derive(IntoParams)]
#[expect(dead_code, reason = "said in the documents, and read one by one")]
pub(super) struct NarrowedPage {
    /// From 1.
    #[param(minimum = 1, maximum = 100_000)]
    page: Option<usize>,
    #[param(minimum = 1, maximum = 100_000)]
    limit: Option<usize>,
    /// `metadata[key]=value`, all of which have to be there.
    #[param(style = DeepObject)]
    metadata: Option<BTreeMap<String, String>>,
}

/// What is started, if the body does not say it.
#[derive(IntoParams)]
#[expect(dead_code, reason = "said in the documents, and read one by one")]
pub(super) struct Source {
    snapshot_id: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct List {
    data: Vec<Instance>,
}

/// `metadata[k]=v` and what else there is.
pub(super) fn metadata_of(pairs: &[(String, String)]) -> BTreeMap<String, String> {
    let named = pairs.iter().filter_map(|(key, value)| {
        let key = key.strip_prefix("metadata[")?.strip_suffix(']')?;
        Some((key.to_owned(), value.clone()))
    });
    named.collect()
}

/// The value of a key that is a number.
pub(super) fn number(pairs: &[(String, String)], key: &str, default: usize) -> Result<usize, Failure> {
    let Some((_, text)) = pairs.iter().find(|(name, _)| name == key) else {
        return Ok(default);
    };
    match text.parse() {
        Ok(number) if (1..=100_000).contains(&number) => Ok(number),
        Ok(_) | Err(_) => Err(Failure::invalid(format!(
            "{key} is not a number from 1 to 100000"
        ))),
    }
}

async fn all(fleet: &Fleet, pairs: &[(String, String)]) -> Result<Vec<Instance>, Failure> {
    let query = MachineQuery {
        filter: MachineFilter {
            template: None,
            metadata: metadata_of(pairs),
        },
        statuses: vec![
            MachineStatus::Starting,
            MachineStatus::Running,
            MachineStatus::Pausing,
            MachineStatus::Paused,
            MachineStatus::Waking,
            MachineStatus::Stopped,
        ],
    };
    let (mut after, mut instances) = (None, Vec::new());
    loop {
        let page: Vec<Machine> = fleet.list(&query, after, PAGE).await?;
        after = page.last().map(|machine| machine.id.clone());
        let last = page.len() < usize::try_from(PAGE).unwrap_or(usize::MAX);
        instances.extend(page.into_iter().map(Instance::from));
        if last {
            return Ok(instances);
        }
    }
}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    Query(Pairs(pairs, _)): Query<Pairs<Narrowed>>,
) -> Result<Json<List>, Failure> {
    let data = all(&fleet, &pairs).await?;
    Ok(Json(List { data }))
}

pub(super) async fn list_pages(
    State(fleet): State<Fleet>,
    Query(Pairs(pairs, _)): Query<Pairs<NarrowedPage>>,
) -> Result<Json<InstancePage>, Failure> {
    let (instances, place) = page(all(&fleet, &pairs).await?, &pairs)?;
    Ok(Json(InstancePage { instances, place }))
}

/// Where a page stands among the others.
#[derive(Serialize, ToSchema)]
pub(super) struct Place {
    total: usize,
    page: usize,
    size: usize,
    total_pages: usize,
    has_next: bool,
    has_prev: bool,
}

#[derive(Serialize, ToSchema)]
pub(super) struct InstancePage {
    instances: Vec<Instance>,
    #[serde(flatten)]
    place: Place,
}

/// One page of a list.
pub(super) fn page<T>(items: Vec<T>, pairs: &[(String, String)]) -> Result<(Vec<T>, Place), Failure> {
    let (page, size) = (number(pairs, "page", 1)?, number(pairs, "limit", 50)?);
    let total = items.len();
    let total_pages = total.div_ceil(size);
    let shown = items.into_iter().skip((page - 1) * size).take(size).collect();
    let place = Place {
        total,
        page,
        size,
        total_pages,
        has_next: page < total_pages,
        has_prev: page > 1,
    };
    Ok((shown, place))
}

/// What an instance goes on from: a snapshot, or else an image of this name.
async fn source_of(fleet: &Fleet, text: &str) -> Result<CreateMachine, Failure> {
    let snapshot = ids::spellings(text)
        .into_iter()
        .find(|id| id.starts_with("snap_"));
    match fleet.find_snapshot(snapshot.as_deref().unwrap_or(text)).await {
        Ok(snapshot) => {
            return Ok(CreateMachine {
                snapshot: Some(snapshot.id.to_string()),
                ..CreateMachine::default()
            });
        }
        Err(error) if error.code == ErrorCode::SnapshotNotFound => {}
        Err(error) => return Err(error.into()),
    }
    Ok(CreateMachine {
        template: images::template(fleet, text).await?,
        vcpus: DEFAULT_VCPUS,
        mem_mib: DEFAULT_MEMORY_MIB,
        ..CreateMachine::default()
    })
}

pub(super) async fn start(
    State(fleet): State<Fleet>,
    Query(Pairs(pairs, _)): Query<Pairs<Source>>,
    OptionalJson(body): OptionalJson<Start>,
) -> Result<Created<Instance>, Failure> {
    let in_query = pairs.iter().find(|(key, _)| key == "snapshot_id");
    let source = body
        .snapshot_id
        .or_else(|| in_query.map(|(_, value)| value.clone()));
    let Some(source) = source.filter(|source| !source.is_empty()) else {
        return Err(Failure::invalid("snapshot_id is missing"));
    };
    let ttl = Ttl::new(body.ttl_seconds, body.ttl_action);
    let source = source_of(&fleet, &source).await?;
    let create = CreateMachine {
        lease: ttl.lease(None)?,
        wake: Some(WakePolicy::OFF),
        metadata: body.metadata.unwrap_or_default(),
        ..source
    };
    validate::create(&create)?;
    let machine = to_the_end(async move {
        let order = CreateOrder {
            body: create,
            idempotency: None,
        };
        let id = fleet.create(order).await?;
        Ok(fleet.view(&id).await?)
    })
    .await?;
    Ok(Created(machine.into()))
}

/// Body of a reboot, and of a boot of a snapshot: only what is given changes.
#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Reboot {
    vcpus: Option<u8>,
    memory: Option<u32>,
    disk_size: Option<u32>,
    metadata: Option<BTreeMap<String, String>>,
    ttl_seconds: Option<u64>,
    ttl_action: Option<TtlAction>,
}

impl Reboot {
    /// What differs from the shape there is.
    fn reshape(&self, now: &Machine) -> Result<Reshape, Failure> {
        // A disk is never smaller than it was; asking for that is asking for no change.
        let disk_mib = self.disk_size.filter(|disk_size| *disk_size > now.disk_mib);
        validate::shape(self.vcpus, self.memory, disk_mib)?;
        Ok(Reshape {
            vcpus: self.vcpus.filter(|vcpus| *vcpus != now.vcpus),
            mem_mib: self.memory.filter(|memory| *memory != now.mem_mib),
            disk_mib,
        })
    }

    async fn set_policies(&self, fleet: &Fleet, id: &MachineId) -> Result<(), Failure> {
        if let Some(metadata) = &self.metadata {
            validate::metadata(metadata)?;
            fleet.set_metadata(id, metadata.clone()).await?;
        }
        if self.ttl_seconds.is_some() {
            let ttl = Ttl::new(self.ttl_seconds, self.ttl_action);
            let before = fleet.view(id).await?.lease.map(|lease| lease.policy.action);
            fleet.set_lease(id, ttl.lease(before)?, PolicyRule::Any).await?;
        }
        Ok(())
    }
}

pub(super) async fn reboot(
    State(fleet): State<Fleet>,
    Named(id): Named,
    OptionalJson(body): OptionalJson<Reboot>,
) -> Result<Json<Instance>, Failure> {
    let machine = to_the_end(async move {
        let change = body.reshape(&fleet.view(&id).await?)?;
        fleet.reboot(&id, change).await?;
        body.set_policies(&fleet, &id).await?;
        Ok(fleet.view(&id).await?)
    })
    .await?;
    Ok(Json(machine.into()))
}

/// A new instance that goes on from a snapshot, or, with another shape, boots from its disk.
pub(super) async fn boot(
    State(fleet): State<Fleet>,
    Path(snapshot): Path<String>,
    OptionalJson(body): OptionalJson<Reboot>,
) -> Result<Created<Instance>, Failure> {
    let ttl = Ttl::new(body.ttl_seconds, body.ttl_action);
    let create = CreateMachine {
        lease: ttl.lease(None)?,
        wake: Some(WakePolicy::OFF),
        metadata: body.metadata.clone().unwrap_or_default(),
        ..source_of(&fleet, &snapshot).await?
    };
    validate::create(&create)?;
    let machine = to_the_end(async move {
        let order = CreateOrder {
            body: create,
            idempotency: None,
        };
        let id = fleet.create(order).await?;
        match reshaped(&fleet, &id, &body).await {
            Ok(machine) => Ok(machine),
            Err(failure) => {
                fleet.delete(&id, PauseOrder::by("api")).await?;
                Err(failure)
            }
        }
    })
    .await?;
    Ok(Created(machine.into()))
}

async fn reshaped(fleet: &Fleet, id: &MachineId, body: &Reboot) -> Result<Machine, Failure> {
    let change = body.reshape(&fleet.view(id).await?)?;
    if change != Reshape::default() {
        fleet.reboot(id, change).await?;
    }
    Ok(fleet.view(id).await?)
}

pub(super) async fn show(State(fleet): State<Fleet>, Named(id): Named) -> Result<Json<Instance>, Failure> {
    Ok(Json(fleet.view(&id).await?.into()))
}

pub(super) async fn stop(State(fleet): State<Fleet>, Named(id): Named) -> Result<NoContent, Failure> {
    fleet.delete(&id, PauseOrder::by("api")).await?;
    Ok(NoContent)
}

pub(super) async fn pause(State(fleet): State<Fleet>, Named(id): Named) -> Result<Json<Instance>, Failure> {
    fleet.pause(&id, PauseOrder::by("api")).await?;
    Ok(Json(fleet.view(&id).await?.into()))
}

pub(super) async fn resume(State(fleet): State<Fleet>, Named(id): Named) -> Result<Json<Instance>, Failure> {
    fleet.resume(&id, ResumeFrom::Memory).await?;
    Ok(Json(fleet.view(&id).await?.into()))
}
