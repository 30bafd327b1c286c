//! `/v1/machines/{id}/services/{port}/grants` and `/v1/edge-keys`: who may reach a service.

use super::answer::Created;
use super::error::{Failure, cut};
use super::extract::{Json as Body, Named, OptionalJson, Path};
use super::machines::to_the_end;
use super::validate;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use torpor_api::http::{
    CreateGrant, EdgeKeyList, Grant, GrantList, IssuedGrant, PatchService, RotateEdgeKey, Service, WakeFilter,
};
use torpor_api::{ErrorCode, GrantId, MachineId};

/// The port of the service that a path names by its name or its port.
async fn port_of(fleet: &Fleet, id: &MachineId, name: &str) -> Result<u16, Failure> {
    let services = fleet.view(id).await?.services;
    let by_name = services.iter().find(|service| service.name == name);
    let found = by_name.or_else(|| services.iter().find(|service| service.port.to_string() == name));
    found.map(|service| service.port).ok_or_else(|| {
        let message = format!("machine {id} exposes no service {:?}", cut(name));
        Failure::new(ErrorCode::ServiceNotFound, message)
    })
}

pub(super) async fn issue(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, name)): Path<(String, String)>,
    OptionalJson(order): OptionalJson<CreateGrant>,
) -> Result<Created<IssuedGrant>, Failure> {
    let issued = to_the_end(async move {
        let port = port_of(&fleet, &id, &name).await?;
        Ok(fleet.issue_grant(&id, port, order).await?)
    });
    Ok(Created(issued.await?))
}

pub(super) async fn grants(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, name)): Path<(String, String)>,
) -> Result<Json<GrantList>, Failure> {
    let port = port_of(&fleet, &id, &name).await?;
    let grants = fleet.grants(&id, Some(port)).await?;
    Ok(Json(GrantList { grants }))
}

pub(super) async fn revoke(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, _, grant)): Path<(String, String, String)>,
) -> Result<Json<Grant>, Failure> {
    let unknown = |_| {
        let message = format!("machine {id} has no grant {:?}", cut(&grant));
        Failure::new(ErrorCode::GrantNotFound, message)
    };
    let grant: GrantId = grant.parse().map_err(unknown)?;
    let revoked = to_the_end(async move { Ok(fleet.revoke_grant(&id, &grant).await?) });
    Ok(Json(revoked.await?))
}

pub(super) async fn patch_service(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, name)): Path<(String, String)>,
    Body(patch): Body<PatchService>,
) -> Result<Json<Service>, Failure> {
    validate::patch_service(&patch)?;
    let changed = to_the_end(async move {
        let service = fleet.patch_service(&id, &name, patch).await?;
        Ok(fleet.show_service(service))
    });
    Ok(Json(changed.await?))
}

pub(super) async fn keys(State(fleet): State<Fleet>) -> Result<Json<EdgeKeyList>, Failure> {
    Ok(Json(fleet.edge_keys().await?))
}

pub(super) async fn rotate(
    State(fleet): State<Fleet>,
    OptionalJson(order): OptionalJson<RotateEdgeKey>,
) -> Result<Json<EdgeKeyList>, Failure> {
    let rotated = to_the_end(async move { Ok(fleet.rotate_edge_key(order.revoke_earlier).await?) });
    Ok(Json(rotated.await?))
}

pub(super) async fn wake_filter(
    State(fleet): State<Fleet>,
    Named(id): Named,
) -> Result<Json<WakeFilter>, Failure> {
    Ok(Json(fleet.wake_filter(&id).await?))
}

pub(super) async fn set_wake_filter(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(filter): Body<WakeFilter>,
) -> Result<Json<WakeFilter>, Failure> {
    let set = to_the_end(async move {
        fleet.set_wake_filter(&id, filter).await?;
        Ok(fleet.wake_filter(&id).await?)
    });
    Ok(Json(set.await?))
}
