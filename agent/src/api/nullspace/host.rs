//! Templates and health.

use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

#[derive(Serialize, ToSchema)]
pub(super) struct Template {
    id: String,
    name: String,
    description: String,
    builtin: bool,
    canonical_ref: String,
    namespace_slug: &'static str,
    visibility: &'static str,
    tags: Vec<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Health {
    status: &'static str,
}

pub(super) async fn templates(State(fleet): State<Fleet>) -> Json<Vec<Template>> {
    let templates = fleet.hypervisor().templates().await;
    let templates = templates.into_iter().map(|template| Template {
        id: format!("tmpl_{}", template.name),
        canonical_ref: template.name.clone(),
        name: template.name,
        description: template.description,
        builtin: true,
        namespace_slug: "torpor",
        visibility: "public",
        tags: Vec::new(),
    });
    Json(templates.collect())
}

pub(super) async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}
