//! `/v1/ssh…` and `/v1/machines/{id}/ssh-…`: who may enter machines by SSH. None of it wakes.

use super::answer::{Created, NoContent};
use super::error::Failure;
use super::extract::{Json as Body, Named, OptionalJson, Path};
use super::machines::to_the_end;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use torpor_api::http::{
    MachineSshKey, NewSshKey, PatchSshKey, SshAccess, SshAccessRequest, SshGateway, SshKey, SshKeyList,
};
use utoipa::ToSchema;

/// `POST /v1/machines/{id}/ssh-key`: nothing to say.
#[derive(Default, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

pub(super) async fn gateway(State(fleet): State<Fleet>) -> Result<Json<SshGateway>, Failure> {
    Ok(Json(fleet.ssh_gateway()?))
}

pub(super) async fn machine_key(
    State(fleet): State<Fleet>,
    Named(id): Named,
) -> Result<Json<MachineSshKey>, Failure> {
    Ok(Json(fleet.machine_ssh_key(&id).await?))
}

pub(super) async fn rotate_machine_key(
    State(fleet): State<Fleet>,
    Named(id): Named,
    OptionalJson(Nothing {}): OptionalJson<Nothing>,
) -> Result<Json<MachineSshKey>, Failure> {
    to_the_end(async move { Ok(fleet.rotate_machine_ssh_key(&id).await?) })
        .await
        .map(Json)
}

pub(super) async fn grant(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(request): Body<SshAccessRequest>,
) -> Result<Created<SshAccess>, Failure> {
    let access = fleet.grant_ssh_access(&id, request).await?;
    Ok(Created(access))
}

pub(super) async fn keys(State(fleet): State<Fleet>) -> Result<Json<SshKeyList>, Failure> {
    Ok(Json(fleet.ssh_keys().await?))
}

pub(super) async fn add_key(
    State(fleet): State<Fleet>,
    Body(new): Body<NewSshKey>,
) -> Result<Created<SshKey>, Failure> {
    Ok(Created(fleet.add_ssh_key(new).await?))
}

pub(super) async fn key(State(fleet): State<Fleet>, Path(id): Path<String>) -> Result<Json<SshKey>, Failure> {
    Ok(Json(fleet.ssh_key(&id).await?))
}

pub(super) async fn rename_key(
    State(fleet): State<Fleet>,
    Path(id): Path<String>,
    Body(patch): Body<PatchSshKey>,
) -> Result<Json<SshKey>, Failure> {
    Ok(Json(fleet.rename_ssh_key(&id, patch.name).await?))
}

pub(super) async fn remove_key(
    State(fleet): State<Fleet>,
    Path(id): Path<String>,
) -> Result<NoContent, Failure> {
    fleet.remove_ssh_key(&id).await?;
    Ok(NoContent)
}
