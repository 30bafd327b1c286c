//! Public URLs, templates and health.

use super::super::error::Failure;
use super::super::extract::{Json as Body, Named};
use super::super::machines::to_the_end;
use super::super::validate;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use torpor_api::http::{Service, ServiceAuth, ServiceKind, ServiceSpec};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Expose {
    port: u16,
}

#[derive(Serialize)]
pub(super) struct Host {
    host: String,
    url: String,
    websocket_url: String,
}

/// The machine's service for this port, exposed if it is not.
async fn exposed(fleet: &Fleet, id: &torpor_api::MachineId, port: u16) -> Result<Service, Failure> {
    let services = fleet.view(id).await?.services.into_iter();
    let mut same = services.filter(|service| service.port == port && service.kind == ServiceKind::Http);
    if let Some(service) = same.next() {
        return Ok(service);
    }
    let spec = ServiceSpec {
        name: None,
        port,
        kind: ServiceKind::Http,
        auth: ServiceAuth::None,
        wake_deadline_ms: None,
    };
    validate::service(&spec)?;
    Ok(fleet.show_service(fleet.expose(id, spec).await?))
}

pub(super) async fn expose(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<Expose>,
) -> Result<Json<Host>, Failure> {
    let service = to_the_end(async move { exposed(&fleet, &id, body.port).await }).await?;
    let host = service.url.trim_start_matches("http://").to_owned();
    Ok(Json(Host {
        url: format!("http://{host}/"),
        websocket_url: format!("ws://{host}/"),
        host,
    }))
}

pub(super) async fn templates(State(fleet): State<Fleet>) -> Json<Value> {
    let templates = fleet.hypervisor().templates().await;
    let templates = templates.into_iter().map(|template| {
        json!({
            "id": format!("tmpl_{}", template.name),
            "name": template.name,
            "description": template.description,
            "builtin": true,
            "canonical_ref": template.name,
            "namespace_slug": "torpor",
            "visibility": "public",
            "tags": [],
        })
    });
    Json(templates.collect())
}

pub(super) async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}
