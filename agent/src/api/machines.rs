//! `/v1/machines`: made, shown, paused, resumed, deleted.

use super::answer::{Created, NoContent, Text};
use super::error::Failure;
use super::extract::{Json as Body, Named, OptionalJson, Query, RawJson};
use super::validate;
use crate::machine::driver::PauseOrder;
use crate::machine::fleet::{CreateOrder, Fleet, MachineQuery};
use crate::store::{Idempotency, MachineFilter};
use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::future::Future;
use torpor_api::http::{CreateMachine, Machine, MachineList, ResumeMachine, SetMetadata};
use torpor_api::{ErrorCode, MachineId};
use utoipa::{IntoParams, ToSchema};

const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;
const DEFAULT_LOG_BYTES: u64 = 64 << 10;
const MAX_LOG_BYTES: u64 = 4 << 20;
pub(super) const MAX_KEY_BYTES: usize = 255;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    after: Option<MachineId>,
    limit: Option<u32>,
    /// Statuses, separated by commas.
    status: Option<String>,
    template: Option<String>,
    /// A JSON object of pairs that the machine's metadata has to hold.
    metadata: Option<String>,
}

impl Page {
    fn query(&self) -> Result<MachineQuery, Failure> {
        let names = self.status.iter().flat_map(|names| names.split(','));
        let statuses = names.map(|name| {
            serde_json::from_value(serde_json::Value::from(name))
                .map_err(|_| Failure::invalid(format!("status {:?} is none", super::error::cut(name))))
        });
        let metadata = self.metadata.as_deref().map(serde_json::from_str).transpose();
        let metadata = metadata
            .map_err(|error| Failure::invalid(format!("metadata is no JSON object of texts: {error}")))?;
        Ok(MachineQuery {
            filter: MachineFilter {
                template: self.template.clone(),
                metadata: metadata.unwrap_or_default(),
            },
            statuses: statuses.collect::<Result<_, _>>()?,
        })
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Tail {
    bytes: Option<u64>,
}

/// A body in which nothing can be said.
#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    Query(page): Query<Page>,
) -> Result<Json<MachineList>, Failure> {
    let limit = page.limit.unwrap_or(DEFAULT_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Failure::invalid(format!(
            "limit is {limit}, and has to be 1 to {MAX_PAGE}"
        )));
    }
    // One more than asked for tells whether there is a next page.
    let mut machines = fleet.list(&page.query()?, page.after, limit + 1).await?;
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = machines.len() > shown;
    machines.truncate(shown);
    let next = machines.last().filter(|_| more).map(|machine| machine.id.clone());
    Ok(Json(MachineList { machines, next }))
}

pub(super) async fn show(State(fleet): State<Fleet>, Named(id): Named) -> Result<Json<Machine>, Failure> {
    Ok(Json(fleet.view(&id).await?))
}

pub(super) async fn create(
    State(fleet): State<Fleet>,
    headers: HeaderMap,
    RawJson(bytes, body): RawJson<CreateMachine>,
) -> Result<Created<Machine>, Failure> {
    validate::create(&body)?;
    let idempotency = idempotency(&headers, &bytes)?;
    let machine = to_the_end(async move {
        let id = fleet.create(CreateOrder { body, idempotency }).await?;
        Ok(fleet.view(&id).await?)
    })
    .await?;
    Ok(Created(machine))
}

pub(super) fn idempotency(headers: &HeaderMap, body: &[u8]) -> Result<Option<Idempotency>, Failure> {
    let Some(key) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    let key = key.to_str().unwrap_or_default();
    let visible = key.bytes().all(|byte| byte.is_ascii_graphic());
    if key.is_empty() || key.len() > MAX_KEY_BYTES || !visible {
        return Err(Failure::invalid(format!(
            "Idempotency-Key is not 1 to {MAX_KEY_BYTES} visible ASCII characters"
        )));
    }
    let digest: [u8; 32] = Sha256::digest(body).into();
    let body_digest = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Some(Idempotency {
        key: key.to_owned(),
        body_digest,
    }))
}

/// A client that hangs up must not leave an operation half done.
pub(super) async fn to_the_end<T: Send + 'static>(
    operation: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    tokio::spawn(operation)
        .await
        .unwrap_or_else(|_| Err(Failure::new(ErrorCode::Internal, "the operation was cut short")))
}

pub(super) async fn delete(State(fleet): State<Fleet>, Named(id): Named) -> Result<NoContent, Failure> {
    fleet.delete(&id, PauseOrder::by("api")).await?;
    Ok(NoContent)
}

pub(super) async fn set_metadata(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<SetMetadata>,
) -> Result<Json<Machine>, Failure> {
    validate::metadata(&body.metadata)?;
    fleet.set_metadata(&id, body.metadata).await?;
    Ok(Json(fleet.view(&id).await?))
}

pub(super) async fn pause(
    State(fleet): State<Fleet>,
    Named(id): Named,
    OptionalJson(Nothing {}): OptionalJson<Nothing>,
) -> Result<Json<Machine>, Failure> {
    fleet.pause(&id, PauseOrder::by("api")).await?;
    Ok(Json(fleet.view(&id).await?))
}

pub(super) async fn resume(
    State(fleet): State<Fleet>,
    Named(id): Named,
    OptionalJson(body): OptionalJson<ResumeMachine>,
) -> Result<Json<Machine>, Failure> {
    fleet.resume(&id, body.from).await?;
    Ok(Json(fleet.view(&id).await?))
}

pub(super) async fn logs(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(tail): Query<Tail>,
) -> Result<Text, Failure> {
    let max_bytes = tail.bytes.unwrap_or(DEFAULT_LOG_BYTES);
    if !(1..=MAX_LOG_BYTES).contains(&max_bytes) {
        return Err(Failure::invalid(format!(
            "bytes is {max_bytes}, and has to be 1 to {MAX_LOG_BYTES}"
        )));
    }
    let console = fleet.hypervisor().console_tail(&id, max_bytes).await;
    let console = console.map_err(crate::machine::error::MachineError::from)?;
    Ok(Text(String::from_utf8_lossy(&console).into_owned()))
}
