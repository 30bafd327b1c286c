//! The HTTP API under `/v1`: requests to operations of the [`Fleet`], outcomes to bodies of [`torpor_api::http`].
//!
//! One router, served twice: on a unix socket that only root can open, and on TCP behind a bearer token. Every
//! failure, whoever finds it, leaves through [`error`], and gets its request ID in [`request_id`]. Every field is
//! checked against [`torpor_api::limits`] in [`validate`] before the fleet sees it. Reads never wake.
//!
//! [`morph`] and [`nullspace`] serve the same fleet in the words of two public SDKs, each on a listener of its own.
//!
//! Not its job: what an operation does.

mod auth;
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
pub use serve::{ServeError, bind_unix, serve_tcp, serve_unix};

use crate::machine::fleet::Fleet;
use axum::Router;
use axum::middleware;
use axum::routing::{delete, get, patch, post, put};
use facade::stamped;

/// Whether torpord is up is no secret, and a probe has no token.
const OPEN: &[&str] = &["/v1/healthz"];

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

fn inside_routes() -> Router<Fleet> {
    Router::new()
        .route(
            "/v1/machines/{id}/exec/stream",
            get(stream::web_socket).post(stream::server_sent),
        )
        .route("/v1/machines/{id}/processes", get(processes::list))
        .route("/v1/machines/{id}/processes/{pid}/logs", get(processes::logs))
        .route("/v1/machines/{id}/processes/{pid}/stdin", post(processes::stdin))
        .route("/v1/machines/{id}/processes/{pid}/kill", post(processes::kill))
        .route(
            "/v1/machines/{id}/processes/{pid}/resize",
            post(processes::resize),
        )
        .route("/v1/machines/{id}/metrics", get(processes::metrics))
        .route("/v1/machines/{id}/files", get(files::download).put(files::upload))
        .route("/v1/machines/{id}/files/list", post(files::list))
        .route("/v1/machines/{id}/files/stat", post(files::stat))
        .route("/v1/machines/{id}/files/mkdir", post(files::make_dir))
        .route("/v1/machines/{id}/files/remove", post(files::remove))
        .route("/v1/machines/{id}/files/rename", post(files::rename))
        .route("/v1/machines/{id}/files/attributes", post(files::set_attributes))
        .route("/v1/machines/{id}/why", get(why::why))
        .route("/v1/machines/{id}/events/stream", get(events::stream_of_machine))
        .route("/v1/events/stream", get(events::stream_of_host))
}

fn routes(fleet: Fleet) -> Router {
    Router::new()
        .route("/v1/machines", get(machines::list).post(machines::create))
        .route("/v1/machines/{id}", get(machines::show).delete(machines::delete))
        .route("/v1/machines/{id}/pause", post(machines::pause))
        .route("/v1/machines/{id}/resume", post(machines::resume))
        .route("/v1/machines/{id}/lease", get(lease::show).put(lease::set))
        .route("/v1/machines/{id}/wake", patch(lease::patch_wake))
        .route("/v1/machines/{id}/metadata", put(machines::set_metadata))
        .route(
            "/v1/machines/{id}/services",
            get(services::list).post(services::expose),
        )
        .route(
            "/v1/machines/{id}/services/{name}",
            delete(services::unexpose).patch(edge::patch_service),
        )
        .route(
            "/v1/machines/{id}/services/{name}/grants",
            get(edge::grants).post(edge::issue),
        )
        .route(
            "/v1/machines/{id}/services/{name}/grants/{grant}",
            delete(edge::revoke),
        )
        .route(
            "/v1/machines/{id}/wake/filter",
            get(edge::wake_filter).put(edge::set_wake_filter),
        )
        .route("/v1/edge-keys", get(edge::keys))
        .route("/v1/edge-keys/rotate", post(edge::rotate))
        .route("/v1/machines/{id}/exec", post(exec::run))
        .route(
            "/v1/machines/{id}/ssh-key",
            get(ssh::machine_key).post(ssh::rotate_machine_key),
        )
        .route("/v1/machines/{id}/ssh-access", post(ssh::grant))
        .route("/v1/ssh", get(ssh::gateway))
        .route("/v1/ssh-keys", get(ssh::keys).post(ssh::add_key))
        .route(
            "/v1/ssh-keys/{id}",
            get(ssh::key).patch(ssh::rename_key).delete(ssh::remove_key),
        )
        .merge(inside_routes())
        .route("/v1/machines/{id}/logs", get(machines::logs))
        .route("/v1/machines/{id}/events", get(events::of_machine))
        .route("/v1/events", get(events::of_host))
        .route(
            "/v1/machines/{id}/snapshots",
            get(snapshots::of_machine).post(snapshots::create),
        )
        .route("/v1/machines/{id}/fork", post(snapshots::fork))
        .route("/v1/snapshots", get(snapshots::list))
        .route(
            "/v1/snapshots/{id}",
            get(snapshots::show)
                .patch(snapshots::change)
                .delete(snapshots::delete),
        )
        .route("/v1/templates", get(host::templates))
        .route("/v1/endpoints", get(host::endpoints))
        .route("/v1/healthz", get(host::health))
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .with_state(fleet)
}

#[cfg(test)]
mod tests;
