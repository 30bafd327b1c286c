//! `POST /v1/machines/{id}/ports/{port}/readiness`: wait until something answers on a port of the guest.
//!
//! The caller says how often to try; nothing tells of a port that begins to listen. Waking is traffic's business,
//! so a machine that traffic does not wake is not woken, and is not ready.

use super::super::error::Failure;
use super::super::extract::{Named, OptionalJson, Path};
use super::dialect::machine_id;
use super::time::iso;
use crate::machine::fleet::{Fleet, WakeSource};
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use torpor_api::{ErrorCode, MachineId};
use utoipa::ToSchema;

/// One try may take as long.
const ONE_TRY: Duration = Duration::from_secs(5);
const MAX_TIMEOUT_SECS: u64 = 300;
const MIN_INTERVAL_MS: u64 = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ProbeKind)]
enum Kind {
    #[default]
    Tcp,
    Http,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Probe {
    kind: Kind,
    timeout_secs: u64,
    interval_ms: u64,
    path: Option<String>,
}

impl Default for Probe {
    fn default() -> Self {
        Self {
            kind: Kind::Tcp,
            timeout_secs: 30,
            interval_ms: 500,
            path: None,
        }
    }
}

/// Nothing that the SDK does not know may be in it.
#[derive(Serialize, ToSchema)]
pub(super) struct Readiness {
    ready: bool,
    route_ready: bool,
    service_ready: bool,
    machine_id: String,
    port: u16,
    kind: Kind,
    checked_at: String,
    elapsed_ms: u64,
    attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    suggested_action: Option<String>,
}

/// Why a try found nothing.
enum Unready {
    /// The machine is not awake.
    Route(Failure),
    Service(String),
}

async fn answers_http(mut stream: TcpStream, path: &str) -> Result<(), String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let said = |error: std::io::Error| error.to_string();
    stream.write_all(request.as_bytes()).await.map_err(said)?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await.map_err(said)?;
    let status = std::str::from_utf8(&head)
        .ok()
        .and_then(|head| head.strip_prefix("HTTP/1."));
    match status
        .and_then(|rest| rest.get(2..5))
        .and_then(|code| code.parse::<u16>().ok())
    {
        Some(code) if code < 500 => Ok(()),
        Some(code) => Err(format!("the service answers {code}")),
        None => Err("what answers does not speak HTTP".to_owned()),
    }
}

async fn try_once(fleet: &Fleet, id: &MachineId, port: u16, probe: &Probe) -> Result<(), Unready> {
    let cause = serde_json::json!({ "operation": "readiness", "port": port });
    let woken = fleet.wake(id, WakeSource::Http, cause).await;
    let woken = woken.map_err(|error| Unready::Route(error.into()))?;
    let connected = woken.pass.epoch().execution.connect(port).await;
    let stream = connected.map_err(|error| Unready::Service(error.to_string()))?;
    match probe.kind {
        Kind::Tcp => Ok(()),
        Kind::Http => answers_http(stream, probe.path.as_deref().unwrap_or("/"))
            .await
            .map_err(Unready::Service),
    }
}

impl Probe {
    fn check(&self) -> Result<(), Failure> {
        if self.timeout_secs > MAX_TIMEOUT_SECS {
            return Err(Failure::invalid(format!(
                "timeout_secs is more than {MAX_TIMEOUT_SECS}"
            )));
        }
        let fits = |path: &String| path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic());
        match &self.path {
            Some(path) if !fits(path) => Err(Failure::invalid("path is no path of a URL")),
            Some(_) | None => Ok(()),
        }
    }
}

pub(super) async fn check(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, port)): Path<(String, u16)>,
    OptionalJson(probe): OptionalJson<Probe>,
) -> Result<Json<Readiness>, Failure> {
    probe.check()?;
    let began = Instant::now();
    let deadline = began + Duration::from_secs(probe.timeout_secs);
    let interval = Duration::from_millis(probe.interval_ms.max(MIN_INTERVAL_MS));
    let mut attempts = 0;
    let outcome = loop {
        attempts += 1;
        let tried = tokio::time::timeout(ONE_TRY, try_once(&fleet, &id, port, &probe)).await;
        let outcome = tried.unwrap_or_else(|_| Err(Unready::Service("no answer".to_owned())));
        let next = Instant::now() + interval;
        if outcome.is_ok() || next >= deadline {
            break outcome;
        }
        tokio::time::sleep_until(next).await;
    };
    let machine = fleet.view(&id).await?;
    let mut readiness = Readiness {
        ready: outcome.is_ok(),
        route_ready: !matches!(outcome, Err(Unready::Route(_))),
        service_ready: outcome.is_ok(),
        machine_id: machine_id(&machine),
        port,
        kind: probe.kind,
        checked_at: iso(fleet.now_unix_ms()),
        elapsed_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        attempts,
        path: probe.path,
        code: None,
        error: None,
        suggested_action: None,
    };
    match outcome {
        Ok(()) => {}
        Err(Unready::Route(failure)) => {
            let error = failure.into_api_error();
            readiness.code = Some(error.code.as_str());
            readiness.error = Some(error.error);
            readiness.suggested_action = Some(error.suggested_action);
        }
        Err(Unready::Service(error)) => {
            readiness.code = Some("preview_service_not_ready");
            readiness.error = Some(error);
            readiness.suggested_action = Some(ErrorCode::ServiceUnreachable.suggested_action().to_owned());
        }
    }
    Ok(Json(readiness))
}
