//! Public URLs of ports: signed, listed, revoked, and tried. A URL is signed for the machine and not for the
//! execution, so it outlives every pause.

use super::super::error::{Failure, cut};
use super::super::extract::{Json as Body, Named, OptionalJson, Path, Query};
use super::super::machines::to_the_end;
use super::super::validate;
use super::dialect::machine_id;
use super::time::iso;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use torpor_api::http::{
    CreateGrant, Grant, GrantStatus, GrantTransport, IssuedGrant, Machine, Service, ServiceAuth, ServiceKind,
    ServiceSpec,
};
use torpor_api::{ErrorCode, GrantId, MachineId, limits};
use utoipa::{IntoParams, ToSchema};

/// A URL that is asked for without saying for how long.
const URL_SECONDS: u64 = *limits::EDGE_TOKEN_SECONDS.end();

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Expose {
    port: u16,
}

#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Sign {
    expires_in_seconds: Option<u64>,
}

#[derive(Deserialize, IntoParams)]
pub(super) struct OfPort {
    port: Option<u16>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Host {
    host: String,
    url: Option<String>,
    websocket_url: Option<String>,
    access_token_expires_at: String,
    access_token_transport: &'static str,
}

/// Nothing that the SDK does not know may be in it.
#[derive(Serialize, ToSchema)]
struct GrantInfo {
    id: GrantId,
    machine_id: String,
    port: u16,
    status: GrantStatus,
    auth_mode: &'static str,
    bootstrap_transport: &'static str,
    token_kinds: &'static [&'static str],
    principal_kind: &'static str,
    issued_at: String,
    expires_at: String,
    revoked_at: Option<String>,
    first_used_at: Option<String>,
    last_used_at: Option<String>,
    use_count: u64,
    http_request_count: u64,
    websocket_connection_count: u64,
    bytes_in_count: u64,
    bytes_out_count: u64,
    created_at: String,
    updated_at: String,
}

#[derive(Serialize, ToSchema)]
pub(super) struct PreviewUrl {
    grant: GrantInfo,
    url: Option<String>,
    websocket_url: Option<String>,
    access_token_expires_at: String,
    access_token_transport: &'static str,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Grants {
    items: Vec<GrantInfo>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Revoked {
    success: bool,
    grant: GrantInfo,
}

fn info(grant: Grant, machine: &Machine) -> GrantInfo {
    let last = [grant.revoked_unix_ms, grant.last_used_unix_ms]
        .into_iter()
        .flatten();
    GrantInfo {
        id: grant.id,
        machine_id: machine_id(machine),
        port: grant.port,
        status: grant.status,
        auth_mode: "direct",
        bootstrap_transport: "query",
        token_kinds: match grant.transport {
            GrantTransport::Any => &["http_port", "websocket_port"],
            GrantTransport::Http => &["http_port"],
            GrantTransport::Websocket => &["websocket_port"],
        },
        principal_kind: "user",
        issued_at: iso(grant.issued_unix_ms),
        expires_at: iso(grant.expires_unix_ms),
        revoked_at: grant.revoked_unix_ms.map(iso),
        first_used_at: grant.first_used_unix_ms.map(iso),
        last_used_at: grant.last_used_unix_ms.map(iso),
        use_count: grant.use_count,
        http_request_count: grant.http_request_count,
        websocket_connection_count: grant.websocket_connection_count,
        bytes_in_count: grant.bytes_in_count,
        bytes_out_count: grant.bytes_out_count,
        created_at: iso(grant.issued_unix_ms),
        updated_at: iso(last.fold(grant.issued_unix_ms, u64::max)),
    }
}

/// The machine's service for this port, exposed for holders of a token if it is not exposed yet.
async fn exposed(fleet: &Fleet, id: &MachineId, port: u16) -> Result<Service, Failure> {
    let services = fleet.view(id).await?.services.into_iter();
    let mut same = services.filter(|service| service.port == port && service.kind == ServiceKind::Http);
    if let Some(service) = same.next() {
        return Ok(service);
    }
    let spec = ServiceSpec {
        name: None,
        port,
        kind: ServiceKind::Http,
        auth: ServiceAuth::Token,
        wake_deadline_ms: None,
    };
    validate::service(&spec)?;
    Ok(fleet.show_service(fleet.expose(id, spec).await?))
}

async fn issued(
    fleet: Fleet,
    id: MachineId,
    port: u16,
    seconds: Option<u64>,
) -> Result<(Service, IssuedGrant), Failure> {
    to_the_end(async move {
        let service = exposed(&fleet, &id, port).await?;
        let order = CreateGrant {
            expires_in_seconds: Some(seconds.unwrap_or(URL_SECONDS)),
            transport: GrantTransport::Any,
        };
        Ok((service, fleet.issue_grant(&id, port, order).await?))
    })
    .await
}

pub(super) async fn host(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<Expose>,
) -> Result<Json<Host>, Failure> {
    let (service, issued) = issued(fleet, id, body.port, None).await?;
    Ok(Json(Host {
        host: service
            .url
            .split_once("://")
            .map_or("", |(_, host)| host)
            .to_owned(),
        url: issued.url,
        websocket_url: issued.websocket_url,
        access_token_expires_at: iso(issued.grant.expires_unix_ms),
        access_token_transport: "query",
    }))
}

async fn preview_url(
    fleet: Fleet,
    id: MachineId,
    port: u16,
    seconds: Option<u64>,
) -> Result<Json<PreviewUrl>, Failure> {
    let machine = fleet.view(&id).await?;
    let (_, issued) = issued(fleet, id, port, seconds).await?;
    Ok(Json(PreviewUrl {
        url: issued.url,
        websocket_url: issued.websocket_url,
        access_token_expires_at: iso(issued.grant.expires_unix_ms),
        access_token_transport: "query",
        grant: info(issued.grant, &machine),
    }))
}

pub(super) async fn show(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, port)): Path<(String, u16)>,
) -> Result<Json<PreviewUrl>, Failure> {
    preview_url(fleet, id, port, None).await
}

pub(super) async fn sign(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, port)): Path<(String, u16)>,
    OptionalJson(body): OptionalJson<Sign>,
) -> Result<Json<PreviewUrl>, Failure> {
    preview_url(fleet, id, port, body.expires_in_seconds).await
}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(of): Query<OfPort>,
) -> Result<Json<Grants>, Failure> {
    let machine = fleet.view(&id).await?;
    let grants = fleet.grants(&id, of.port).await?.into_iter();
    Ok(Json(Grants {
        items: grants.map(|grant| info(grant, &machine)).collect(),
    }))
}

pub(super) async fn revoke(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Path((_, grant)): Path<(String, String)>,
) -> Result<Json<Revoked>, Failure> {
    let unknown = |_| Failure::new(ErrorCode::GrantNotFound, format!("no grant {:?}", cut(&grant)));
    let grant: GrantId = grant.parse().map_err(unknown)?;
    let machine = fleet.view(&id).await?;
    let grant = to_the_end(async move { Ok(fleet.revoke_grant(&id, &grant).await?) }).await?;
    Ok(Json(Revoked {
        success: true,
        grant: info(grant, &machine),
    }))
}
