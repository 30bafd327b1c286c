//! `POST /v1/machines`. The SDK sends every key, most of them `null`.

use super::super::answer::Created;
use super::super::error::Failure;
use super::super::extract::RawJson;
use super::super::facade::disk_mib;
use super::super::machines::{idempotency, to_the_end};
use super::super::validate;
use super::model::{Info, TimeoutAction, mark_ephemeral, stored_metadata};
use super::snapshots::refuse_pause;
use crate::machine::fleet::{CreateOrder, Fleet};
use axum::extract::State;
use axum::http::HeaderMap;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use torpor_api::http::{CreateMachine, WakePolicy};
use torpor_api::{ErrorCode, LeaseMode, LeasePolicy};
use utoipa::ToSchema;

const DEFAULT_TIMEOUT_MS: u64 = 300_000;

/// What becomes of the machine at its timeout, as older callers say it.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum OnTimeout {
    Destroy,
    Pause,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Lifecycle {
    on_timeout: Option<OnTimeout>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Network {
    #[serde(default)]
    allow_public_traffic: Option<bool>,
    #[serde(default)]
    mask_request_host: Option<String>,
    #[serde(default)]
    egress: Option<Value>,
    #[serde(default)]
    deny_out: Option<Vec<String>>,
    #[serde(default)]
    allow_out: Option<Vec<String>>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Create {
    template: Option<String>,
    snapshot_id: Option<String>,
    vcpus: Option<u8>,
    memory_mb: Option<u32>,
    disk_mb: Option<u32>,
    timeout_ms: Option<u64>,
    timeout_action: Option<TimeoutAction>,
    lifecycle: Option<Lifecycle>,
    auto_resume: Option<bool>,
    ephemeral: Option<bool>,
    inactivity_timeout_ms: Option<u64>,
    auto_delete_after_ms: Option<u64>,
    envs: Option<BTreeMap<String, String>>,
    metadata: Option<Map<String, Value>>,
    internet_access: Option<bool>,
    cwd: Option<String>,
    desktop: Option<Value>,
    network: Option<Network>,
    volumes: Option<Vec<Value>>,
    warm_pool: Option<Value>,
}

/// A timeout as a lease; leases are whole seconds, and a machine is never given less time than was asked for.
pub(super) fn lease(timeout_ms: u64, action: TimeoutAction) -> Result<LeasePolicy, Failure> {
    let lease = LeasePolicy {
        seconds: timeout_ms.div_ceil(1000),
        action: action.into(),
        mode: LeaseMode::Absolute,
    };
    validate::lease(lease)?;
    Ok(lease)
}

impl Create {
    fn action(&self) -> TimeoutAction {
        let on_timeout = self.lifecycle.as_ref().and_then(|lifecycle| lifecycle.on_timeout);
        match (self.timeout_action, on_timeout) {
            (Some(action), _) => action,
            (None, Some(OnTimeout::Pause)) => TimeoutAction::Hibernate,
            (None, Some(OnTimeout::Destroy) | None) => TimeoutAction::Destroy,
        }
    }

    /// What is asked for and not built is refused, never ignored.
    fn check_built(&self) -> Result<(), Failure> {
        let network = self.network.as_ref();
        let some = |list: &Option<Vec<String>>| list.as_ref().is_some_and(|list| !list.is_empty());
        let asked = [
            (
                "volumes",
                self.volumes.as_ref().is_some_and(|volumes| !volumes.is_empty()),
            ),
            ("desktop", self.desktop.is_some()),
            ("internet_access=false", self.internet_access == Some(false)),
            ("inactivity_timeout_ms", self.inactivity_timeout_ms.is_some()),
            ("auto_delete_after_ms", self.auto_delete_after_ms.is_some()),
            ("warm_pool", self.warm_pool.is_some()),
            (
                "network.allow_public_traffic=false",
                network.is_some_and(|network| network.allow_public_traffic == Some(false)),
            ),
            (
                "network.mask_request_host",
                network.is_some_and(|network| network.mask_request_host.is_some()),
            ),
            (
                "network egress rules",
                network.is_some_and(|network| {
                    network.egress.is_some() || some(&network.deny_out) || some(&network.allow_out)
                }),
            ),
        ];
        match asked.into_iter().find(|(_, asked)| *asked) {
            Some((what, _)) => Err(Failure::new(
                ErrorCode::NotImplemented,
                format!("{what} is not implemented"),
            )),
            None => Ok(()),
        }
    }

    fn into_native(self) -> Result<CreateMachine, Failure> {
        self.check_built()?;
        let action = self.action();
        let auto_resume = self.auto_resume.unwrap_or(false);
        let ephemeral = self.ephemeral.unwrap_or(false);
        if auto_resume && (ephemeral || action == TimeoutAction::Destroy) {
            return Err(Failure::invalid(
                "auto_resume needs on_timeout 'pause', and a machine that is not ephemeral",
            ));
        }
        if ephemeral && action == TimeoutAction::Hibernate {
            return Err(Failure::invalid(
                "an ephemeral machine is destroyed at its timeout",
            ));
        }
        let wake = WakePolicy {
            http: auto_resume,
            ssh: auto_resume,
            tcp: auto_resume,
            api: auto_resume,
        };
        let mut metadata = stored_metadata(&self.metadata.unwrap_or_default());
        if ephemeral {
            mark_ephemeral(&mut metadata);
        }
        // A snapshot brings its template and its shape.
        let default = CreateMachine::default();
        let create = CreateMachine {
            name: None,
            template: self.template.unwrap_or(default.template),
            snapshot: self.snapshot_id,
            vcpus: self.vcpus.unwrap_or(default.vcpus),
            mem_mib: self.memory_mb.unwrap_or(default.mem_mib),
            disk_mib: self.disk_mb,
            lease: Some(lease(self.timeout_ms.unwrap_or(DEFAULT_TIMEOUT_MS), action)?),
            wake: Some(wake),
            activity: None,
            retention_seconds: None,
            services: Vec::new(),
            metadata,
            env: self.envs.unwrap_or_default(),
            cwd: self.cwd,
        };
        validate::create(&create)?;
        Ok(create)
    }
}

pub(super) async fn create(
    State(fleet): State<Fleet>,
    headers: HeaderMap,
    RawJson(bytes, body): RawJson<Create>,
) -> Result<Created<Info>, Failure> {
    let idempotency = idempotency(&headers, &bytes)?;
    if let Some(snapshot) = &body.snapshot_id {
        refuse_pause(&fleet, snapshot).await?;
    }
    let template = body.template.as_deref().unwrap_or_default();
    let disk_mb = disk_mib(&fleet, template, body.disk_mb).await;
    let body = Create { disk_mb, ..body }.into_native()?;
    let machine = to_the_end(async move {
        let id = fleet.create(CreateOrder { body, idempotency }).await?;
        Ok(fleet.view(&id).await?)
    })
    .await?;
    Ok(Created(machine.into()))
}
