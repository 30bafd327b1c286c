//! `/v1/machines/{id}/lease`, `/activity`, `/retention` and `/wake`: the policies of a machine.

use super::error::Failure;
use super::extract::{Json as Body, Named};
use super::validate;
use crate::machine::fleet::{Fleet, PolicyRule};
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use torpor_api::Lease;
use torpor_api::activity::{ActivityPolicy, PatchActivity};
use torpor_api::http::{Machine, MachineRetention, PatchWake, SetLease, SetRetention};
use utoipa::ToSchema;

/// The lease, or `null`.
#[derive(Serialize, ToSchema)]
pub(super) struct AnyLease(Option<Lease>);

pub(super) async fn show(State(fleet): State<Fleet>, Named(id): Named) -> Result<Json<AnyLease>, Failure> {
    Ok(Json(AnyLease(fleet.view(&id).await?.lease)))
}

pub(super) async fn set(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<SetLease>,
) -> Result<Json<AnyLease>, Failure> {
    if let Some(lease) = body.lease {
        validate::lease(lease)?;
    }
    fleet
        .set_lease(&id, body.lease, PolicyRule::DestroyOrWake)
        .await?;
    Ok(Json(AnyLease(fleet.view(&id).await?.lease)))
}

pub(super) async fn show_retention(
    State(fleet): State<Fleet>,
    Named(id): Named,
) -> Result<Json<Option<MachineRetention>>, Failure> {
    Ok(Json(fleet.view(&id).await?.retention))
}

pub(super) async fn set_retention(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<SetRetention>,
) -> Result<Json<Option<MachineRetention>>, Failure> {
    validate::retention(body.retention_seconds)?;
    fleet.set_retention(&id, body.retention_seconds).await?;
    Ok(Json(fleet.view(&id).await?.retention))
}

pub(super) async fn show_activity(
    State(fleet): State<Fleet>,
    Named(id): Named,
) -> Result<Json<ActivityPolicy>, Failure> {
    Ok(Json(fleet.view(&id).await?.activity))
}

pub(super) async fn patch_activity(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(patch): Body<PatchActivity>,
) -> Result<Json<ActivityPolicy>, Failure> {
    validate::activity(&patch.of(ActivityPolicy::default()))?;
    Ok(Json(fleet.patch_activity(&id, patch).await?))
}

pub(super) async fn patch_wake(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(patch): Body<PatchWake>,
) -> Result<Json<Machine>, Failure> {
    fleet.patch_wake(&id, patch, PolicyRule::DestroyOrWake).await?;
    Ok(Json(fleet.view(&id).await?))
}
