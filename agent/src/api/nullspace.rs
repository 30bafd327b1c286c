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
mod files;
mod host;
mod lifecycle;
mod machines;
mod metrics;
mod model;
mod preview;
mod readiness;
mod snapshots;
mod ssh;
mod time;
mod unbuilt;
mod uploads;
mod ws;

use super::auth::{self, Token};
use super::error;
use super::facade::{self, stamped, tidied};
use crate::machine::fleet::Fleet;
use axum::middleware;
use axum::routing::{delete, get, post, put};
use axum::{Extension, Router};

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
        .route("/v1/machines/{id}/processes", get(exec::processes))
        .route("/v1/machines/{id}/processes/{pid}/kill", post(exec::kill))
        .route("/v1/machines/{id}/processes/{pid}/stdin", post(exec::send_stdin))
        .route("/v1/machines/{id}/processes/{pid}/logs", get(exec::logs))
        .route("/v1/machines/{id}/ws", get(ws::connect))
        .route("/v1/machines/{id}/pty", get(ws::list))
        .route("/v1/machines/{id}/pty/{sid}", get(ws::show).delete(ws::kill))
        .route("/v1/machines/{id}/pty/{sid}/resize", post(ws::resize))
        .route("/v1/machines/{id}/metrics", get(metrics::show))
        .route("/v1/machines/{id}/file", get(files::download).put(files::upload))
        .route("/v1/machines/{id}/files", get(files::list))
        .route("/v1/machines/{id}/files/read", post(files::read))
        .route("/v1/machines/{id}/files/write", post(files::write))
        .route("/v1/machines/{id}/files/exists", post(files::exists))
        .route("/v1/machines/{id}/files/info", post(files::info))
        .route("/v1/machines/{id}/files/mkdir", post(files::make_dir))
        .route("/v1/machines/{id}/files/remove", post(files::remove))
        .route("/v1/machines/{id}/files/rename", post(files::rename))
        .route("/v1/machines/{id}/uploads", post(uploads::create))
        .route(
            "/v1/machines/{id}/uploads/{upload_id}",
            get(uploads::show).delete(uploads::abort),
        )
        .route(
            "/v1/machines/{id}/uploads/{upload_id}/parts/{part_number}",
            put(uploads::put_part),
        )
        .route(
            "/v1/machines/{id}/uploads/{upload_id}/complete",
            post(uploads::complete),
        )
        .route("/v1/lifecycle/events", get(lifecycle::of_host))
        .route("/v1/lifecycle/ws", get(lifecycle::watch_host))
        .route("/v1/machines/{id}/lifecycle", get(lifecycle::of_machine))
        .route("/v1/machines/{id}/lifecycle/ws", get(lifecycle::watch_machine))
        .route("/v1/snapshots/{id}/lifecycle", get(lifecycle::of_snapshot))
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
        .layer(Extension(uploads::Uploads::default()))
        .with_state(fleet)
}

#[cfg(test)]
mod tests;
