//! The API of the `nullspace-sdk`: the fleet in its words.
//!
//! A machine's ID here is that of its latest execution, so every resume brings a new one, and every earlier one goes
//! on leading to the machine. A pause is a hibernation, which is shown as a snapshot of its own for as long as it
//! lasts; a lease is a timeout in milliseconds; the wake switches are one, `auto_resume`.
//!
//! The SDK parses strictly: optional fields are left out rather than `null`, some objects may hold nothing more
//! than it knows.
//!
//! Not its job: any behaviour. What an operation does is the fleet's; what is refused and why, too.

mod create;
mod dialect;
mod exec;
mod host;
mod machines;
mod model;
mod preview;
mod readiness;
mod snapshots;
mod ssh;
mod time;
mod unbuilt;

use super::auth::{self, Token};
use super::error;
use super::facade::{self, stamped, tidied};
use crate::machine::fleet::Fleet;
use axum::Router;
use axum::middleware;
use axum::routing::{delete, get, post};

/// Whether torpord is up is no secret, and a probe has no token.
const OPEN: &[&str] = &["/healthz"];

/// The API behind a bearer token.
pub fn router(fleet: Fleet, token: Token) -> Router {
    let lock = auth::Lock { token, open: OPEN };
    let routes = routes(fleet).layer(middleware::from_fn_with_state(lock, auth::require));
    tidied(stamped(routes, dialect::shape), |_| {})
}

fn routes(fleet: Fleet) -> Router {
    let router = Router::new()
        .route("/healthz", get(host::health))
        .route("/v1/templates", get(host::templates))
        .route("/v1/machines", get(machines::list).post(create::create))
        .route("/v1/machines/{id}", get(machines::show).delete(machines::destroy))
        .route("/v1/machines/{id}/hibernate", post(machines::hibernate))
        .route("/v1/machines/{id}/resume", post(machines::resume))
        .route("/v1/machines/{id}/timeout", post(machines::set_timeout))
        .route("/v1/machines/{id}/host", post(preview::host))
        .route("/v1/machines/{id}/ports/{port}/preview-url", get(preview::show))
        .route(
            "/v1/machines/{id}/ports/{port}/signed-preview-url",
            post(preview::sign),
        )
        .route("/v1/machines/{id}/ports/{port}/readiness", post(readiness::check))
        .route("/v1/machines/{id}/preview-urls", get(preview::list))
        .route(
            "/v1/machines/{id}/preview-urls/{grant_id}",
            delete(preview::revoke),
        )
        .route("/v1/machines/{id}/exec", post(exec::run))
        .route("/v1/machines/{id}/snapshots", post(snapshots::create))
        .route("/v1/machines/{id}/fork", post(snapshots::fork))
        .route("/v1/machines/{id}/ssh-access", post(ssh::grant))
        .route("/v1/snapshots", get(snapshots::list))
        .route(
            "/v1/snapshots/{id}",
            get(snapshots::show).delete(snapshots::delete),
        );
    facade::unbuilt(router, unbuilt::ROUTES)
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .with_state(fleet)
}

#[cfg(test)]
mod tests;
