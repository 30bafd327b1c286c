//! Templates and health.

use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

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
