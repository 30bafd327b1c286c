//! TTL, wake-on, metadata and HTTP services of an instance. All of them can be changed in any state.

use super::super::error::Failure;
use super::super::extract::{Json as Body, Named, Path};
use super::super::machines::to_the_end;
use super::super::validate;
use super::model::Instance;
use crate::machine::fleet::{Fleet, PolicyRule};
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use torpor_api::http::{PatchService, PatchWake, ServiceAuth, ServiceKind, ServiceSpec};
use torpor_api::{LeaseAction, LeaseMode, LeasePolicy};
use utoipa::ToSchema;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum TtlAction {
    Stop,
    Pause,
}

/// Body of a TTL.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Ttl {
    ttl_seconds: Option<u64>,
    #[serde(default)]
    ttl_action: Option<TtlAction>,
}

impl Ttl {
    pub(super) fn new(ttl_seconds: Option<u64>, ttl_action: Option<TtlAction>) -> Self {
        Self {
            ttl_seconds,
            ttl_action,
        }
    }

    /// The lease that this TTL asks for; an action that is not said stays what it is, and is `stop` at first.
    pub(super) fn lease(self, before: Option<LeaseAction>) -> Result<Option<LeasePolicy>, Failure> {
        let Some(seconds) = self.ttl_seconds else {
            return Ok(None);
        };
        let action = match self.ttl_action {
            Some(TtlAction::Stop) => LeaseAction::Destroy,
            Some(TtlAction::Pause) => LeaseAction::Pause,
            None => before.unwrap_or(LeaseAction::Destroy),
        };
        let lease = LeasePolicy {
            seconds,
            action,
            mode: LeaseMode::Absolute,
        };
        validate::lease(lease)?;
        Ok(Some(lease))
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct WakeOn {
    wake_on_ssh: Option<bool>,
    wake_on_http: Option<bool>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum AuthMode {
    #[default]
    None,
    ApiKey,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Expose {
    name: String,
    port: u16,
    #[serde(default)]
    auth_mode: Option<AuthMode>,
}

pub(super) async fn set_ttl(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(ttl): Body<Ttl>,
) -> Result<Json<Instance>, Failure> {
    let before = fleet.view(&id).await?.lease.map(|lease| lease.policy.action);
    fleet.set_lease(&id, ttl.lease(before)?, PolicyRule::Any).await?;
    Ok(Json(fleet.view(&id).await?.into()))
}

/// Calls that need the guest wake it as SSH does, and every kind of exposed port as HTTP does.
pub(super) async fn set_wake_on(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(wake): Body<WakeOn>,
) -> Result<Json<Instance>, Failure> {
    let patch = PatchWake {
        http: wake.wake_on_http,
        tcp: wake.wake_on_http,
        ssh: wake.wake_on_ssh,
        api: wake.wake_on_ssh,
    };
    fleet.patch_wake(&id, patch, PolicyRule::Any).await?;
    Ok(Json(fleet.view(&id).await?.into()))
}

pub(super) async fn set_metadata(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(metadata): Body<BTreeMap<String, String>>,
) -> Result<Json<Instance>, Failure> {
    validate::metadata(&metadata)?;
    fleet.set_metadata(&id, metadata).await?;
    Ok(Json(fleet.view(&id).await?.into()))
}

/// A name that is exposed already leads to the new port from now on.
pub(super) async fn expose(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<Expose>,
) -> Result<Json<Instance>, Failure> {
    let name = body
        .name
        .parse()
        .map_err(|error| Failure::invalid(format!("{error}")))?;
    let spec = ServiceSpec {
        name: Some(name),
        port: body.port,
        kind: ServiceKind::Http,
        auth: match body.auth_mode.unwrap_or_default() {
            AuthMode::None => ServiceAuth::None,
            AuthMode::ApiKey => ServiceAuth::ApiKey,
        },
        wake_deadline_ms: None,
    };
    validate::service(&spec)?;
    let machine = to_the_end(async move {
        let services = fleet.view(&id).await?.services;
        let patch = PatchService {
            auth: Some(spec.auth),
            ..PatchService::default()
        };
        match services.iter().find(|service| service.name == body.name) {
            Some(service) if service.port == spec.port && service.kind == spec.kind => {
                fleet.patch_service(&id, &service.name, patch).await?;
            }
            Some(service) => {
                fleet.unexpose(&id, &service.name).await?;
                fleet.expose(&id, spec).await?;
            }
            None => {
                fleet.expose(&id, spec).await?;
            }
        }
        Ok(fleet.view(&id).await?)
    })
    .await?;
    Ok(Json(machine.into()))
}

pub(super) async fn hide(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, name)): Path<(String, String)>,
) -> Result<Json<Instance>, Failure> {
    let machine = to_the_end(async move {
        fleet.unexpose(&id, &name).await?;
        Ok(fleet.view(&id).await?)
    })
    .await?;
    Ok(Json(machine.into()))
}
