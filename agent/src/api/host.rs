//! `/v1/templates`, `/v1/endpoints`, `/v1/healthz` and `/v1/metrics`: the host itself.

use super::answer::OpenMetrics;
use super::error::Failure;
use crate::machine::fleet::{Fleet, status_counts};
use axum::Json;
use axum::extract::State;
use torpor_api::http::{Endpoints, Health, SshEndpoint, Template, TemplateList};

pub(super) async fn templates(State(fleet): State<Fleet>) -> Json<TemplateList> {
    let templates = fleet.hypervisor().templates().await;
    let templates = templates.into_iter().map(|template| Template {
        name: template.name,
        disk_mib: template.disk_mib,
        description: template.description,
    });
    Json(TemplateList {
        templates: templates.collect(),
    })
}

pub(super) async fn endpoints(State(fleet): State<Fleet>) -> Json<Endpoints> {
    let gateway = fleet.ssh_gateway().ok();
    Json(Endpoints {
        ssh: gateway.map(|gateway| SshEndpoint {
            host: gateway.host,
            port: gateway.port,
        }),
        ..fleet.settings().endpoints.clone()
    })
}

pub(super) async fn health(State(fleet): State<Fleet>) -> Result<Json<Health>, Failure> {
    Ok(Json(Health {
        status: "ok".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        machines: status_counts(&fleet).await?,
        pools: fleet.hypervisor().pools(),
    }))
}

pub(super) async fn metrics(State(fleet): State<Fleet>) -> Result<OpenMetrics, Failure> {
    Ok(OpenMetrics(fleet.telemetry().await?))
}
