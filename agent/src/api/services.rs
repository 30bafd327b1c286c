//! `/v1/machines/{id}/services`: which ports of the guest can be reached.

use super::answer::{Created, NoContent};
use super::error::Failure;
use super::extract::{Json as Body, Named, Path};
use super::machines::to_the_end;
use super::validate;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use torpor_api::http::{Service, ServiceSpec};
use utoipa::ToSchema;

/// `GET /v1/machines/{id}/services`.
#[derive(Serialize, ToSchema)]
pub(super) struct ServiceList {
    services: Vec<Service>,
}

pub(super) async fn list(State(fleet): State<Fleet>, Named(id): Named) -> Result<Json<ServiceList>, Failure> {
    Ok(Json(ServiceList {
        services: fleet.view(&id).await?.services,
    }))
}

pub(super) async fn expose(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(spec): Body<ServiceSpec>,
) -> Result<Created<Service>, Failure> {
    validate::service(&spec)?;
    let service = to_the_end(async move {
        let service = fleet.expose(&id, spec).await?;
        Ok(fleet.show_service(service))
    })
    .await?;
    Ok(Created(service))
}

pub(super) async fn unexpose(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, name)): Path<(String, String)>,
) -> Result<NoContent, Failure> {
    to_the_end(async move { Ok(fleet.unexpose(&id, &name).await?) }).await?;
    Ok(NoContent)
}
