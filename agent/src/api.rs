//! The HTTP API under `/v1`: requests to operations of the [`Fleet`], outcomes to bodies of [`torpor_api::http`].
//!
//! One router, served twice: on a unix socket that only root can open, and on TCP behind a bearer token. Every
//! failure, whoever finds it, leaves through [`error`], and gets its request ID in [`request_id`]. Every field is
//! checked against [`torpor_api::limits`] in [`validate`] before the fleet sees it. Reads never wake.
//!
//! [`morph`] and [`nullspace`] serve the same fleet in the words of two public SDKs, each on a listener of its own.
//!
//! Not its job: what an operation does.

mod answer;
mod auth;
mod describe;
mod edge;
mod error;
mod events;
mod exec;
mod extract;
mod facade;
mod files;
mod host;
mod lease;
mod machines;
pub mod morph;
pub mod nullspace;
mod processes;
mod request_id;
mod serve;
mod services;
mod snapshots;
mod ssh;
mod stream;
mod table;
mod validate;
mod why;

pub use auth::{Token, TokenError};
pub use serve::{ServeError, bind_unix, serve_tcp, serve_tcp_on, serve_unix};

use crate::machine::fleet::Fleet;
use axum::Router;
use axum::middleware;
use facade::stamped;
use table::Table;

/// Whether torpord is up is no secret, and a probe has no token.
const OPEN: &[&str] = &["/v1/healthz", "/openapi/native.json"];

/// The API without authentication, for the unix socket.
pub fn router(fleet: Fleet) -> Router {
    stamped(routes(fleet), request_id::native)
}

/// The API behind a bearer token, for TCP.
pub fn router_with_token(fleet: Fleet, token: Token) -> Router {
    let lock = auth::Lock { token, open: OPEN };
    let locked = routes(fleet).layer(middleware::from_fn_with_state(lock, auth::require));
    stamped(locked, request_id::native)
}

fn routes(fleet: Fleet) -> Router {
    table()
        .into_router::<torpor_api::ApiError>("Torpor: the native API", "/openapi/native.json", OPEN)
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .with_state(fleet)
}

/// What is served.
fn table() -> Table<Fleet> {
    inside_routes(Table::new())
        .get("/v1/machines", machines::list)
        .post("/v1/machines", machines::create)
        .get("/v1/machines/{id}", machines::show)
        .delete("/v1/machines/{id}", machines::delete)
        .post("/v1/machines/{id}/pause", machines::pause)
        .post("/v1/machines/{id}/resume", machines::resume)
        .get("/v1/machines/{id}/lease", lease::show)
        .put("/v1/machines/{id}/lease", lease::set)
        .get("/v1/machines/{id}/activity", lease::show_activity)
        .patch("/v1/machines/{id}/activity", lease::patch_activity)
        .get("/v1/machines/{id}/retention", lease::show_retention)
        .put("/v1/machines/{id}/retention", lease::set_retention)
        .patch("/v1/machines/{id}/wake", lease::patch_wake)
        .put("/v1/machines/{id}/metadata", machines::set_metadata)
        .get("/v1/machines/{id}/services", services::list)
        .post("/v1/machines/{id}/services", services::expose)
        .delete("/v1/machines/{id}/services/{name}", services::unexpose)
        .patch("/v1/machines/{id}/services/{name}", edge::patch_service)
        .get("/v1/machines/{id}/services/{name}/grants", edge::grants)
        .post("/v1/machines/{id}/services/{name}/grants", edge::issue)
        .delete("/v1/machines/{id}/services/{name}/grants/{grant}", edge::revoke)
        .get("/v1/machines/{id}/wake/filter", edge::wake_filter)
        .put("/v1/machines/{id}/wake/filter", edge::set_wake_filter)
        .get("/v1/edge-keys", edge::keys)
        .post("/v1/edge-keys/rotate", edge::rotate)
        .post("/v1/machines/{id}/exec", exec::run)
        .get("/v1/machines/{id}/ssh-key", ssh::machine_key)
        .post("/v1/machines/{id}/ssh-key", ssh::rotate_machine_key)
        .post("/v1/machines/{id}/ssh-access", ssh::grant)
        .get("/v1/ssh", ssh::gateway)
        .get("/v1/ssh-keys", ssh::keys)
        .post("/v1/ssh-keys", ssh::add_key)
        .get("/v1/ssh-keys/{id}", ssh::key)
        .patch("/v1/ssh-keys/{id}", ssh::rename_key)
        .delete("/v1/ssh-keys/{id}", ssh::remove_key)
        .get("/v1/machines/{id}/logs", machines::logs)
        .get("/v1/machines/{id}/events", events::of_machine)
        .get("/v1/events", events::of_host)
        .get("/v1/machines/{id}/snapshots", snapshots::of_machine)
        .post("/v1/machines/{id}/snapshots", snapshots::create)
        .post("/v1/machines/{id}/fork", snapshots::fork)
        .get("/v1/snapshots", snapshots::list)
        .get("/v1/snapshots/{id}", snapshots::show)
        .patch("/v1/snapshots/{id}", snapshots::change)
        .delete("/v1/snapshots/{id}", snapshots::delete)
        .get("/v1/templates", host::templates)
        .get("/v1/endpoints", host::endpoints)
        .get("/v1/healthz", host::health)
        .get("/v1/metrics", host::metrics)
}

fn inside_routes(table: Table<Fleet>) -> Table<Fleet> {
    table
        .get("/v1/machines/{id}/exec/stream", stream::web_socket)
        .post("/v1/machines/{id}/exec/stream", stream::server_sent)
        .get("/v1/machines/{id}/processes", processes::list)
        .get("/v1/machines/{id}/processes/{pid}/logs", processes::logs)
        .post("/v1/machines/{id}/processes/{pid}/stdin", processes::stdin)
        .post("/v1/machines/{id}/processes/{pid}/kill", processes::kill)
        .post("/v1/machines/{id}/processes/{pid}/resize", processes::resize)
        .get("/v1/machines/{id}/metrics", processes::metrics)
        .get("/v1/machines/{id}/files", files::download)
        .put("/v1/machines/{id}/files", files::upload)
        .post("/v1/machines/{id}/files/list", files::list)
        .post("/v1/machines/{id}/files/stat", files::stat)
        .post("/v1/machines/{id}/files/mkdir", files::make_dir)
        .post("/v1/machines/{id}/files/remove", files::remove)
        .post("/v1/machines/{id}/files/rename", files::rename)
        .post("/v1/machines/{id}/files/attributes", files::set_attributes)
        .get("/v1/machines/{id}/why", why::why)
        .get("/v1/machines/{id}/events/stream", events::stream_of_machine)
        .get("/v1/events/stream", events::stream_of_host)
}

#[cfg(test)]
mod tests;
