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
use super::table::Table;
use crate::machine::fleet::Fleet;
use axum::middleware;
use axum::{Extension, Router};

/// Whether torpord is up is no secret, and a probe has no token; nor is what the API is.
const OPEN: &[&str] = &["/healthz", "/openapi/nullspace.json"];

/// The API behind a bearer token.
pub fn router(fleet: Fleet, token: Token) -> Router {
    let lock = auth::Lock { token, open: OPEN };
    let routes = routes(fleet).layer(middleware::from_fn_with_state(lock, auth::require));
    tidied(stamped(routes, dialect::shape), |_| {})
}

fn routes(fleet: Fleet) -> Router {
    let router = table().into_router::<dialect::ErrorBody>(
        "Torpor: the API of the nullspace-sdk",
        "/openapi/nullspace.json",
        OPEN,
    );
    facade::unbuilt(router, unbuilt::ROUTES)
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .layer(Extension(uploads::Uploads::default()))
        .with_state(fleet)
}

/// What is built.
pub(super) fn table() -> Table<Fleet> {
    Table::new()
        .get("/healthz", host::health)
        .get("/v1/templates", host::templates)
        .get("/v1/machines", machines::list)
        .post("/v1/machines", create::create)
        .get("/v1/machines/{id}", machines::show)
        .delete("/v1/machines/{id}", machines::destroy)
        .post("/v1/machines/{id}/hibernate", machines::hibernate)
        .post("/v1/machines/{id}/resume", machines::resume)
        .post("/v1/machines/{id}/timeout", machines::set_timeout)
        .post("/v1/machines/{id}/host", preview::host)
        .get("/v1/machines/{id}/ports/{port}/preview-url", preview::show)
        .post("/v1/machines/{id}/ports/{port}/signed-preview-url", preview::sign)
        .post("/v1/machines/{id}/ports/{port}/readiness", readiness::check)
        .get("/v1/machines/{id}/preview-urls", preview::list)
        .delete("/v1/machines/{id}/preview-urls/{grant_id}", preview::revoke)
        .post("/v1/machines/{id}/exec", exec::run)
        .get("/v1/machines/{id}/processes", exec::processes)
        .post("/v1/machines/{id}/processes/{pid}/kill", exec::kill)
        .post("/v1/machines/{id}/processes/{pid}/stdin", exec::send_stdin)
        .get("/v1/machines/{id}/processes/{pid}/logs", exec::logs)
        .get("/v1/machines/{id}/ws", ws::connect)
        .get("/v1/machines/{id}/pty", ws::list)
        .get("/v1/machines/{id}/pty/{sid}", ws::show)
        .delete("/v1/machines/{id}/pty/{sid}", ws::kill)
        .post("/v1/machines/{id}/pty/{sid}/resize", ws::resize)
        .get("/v1/machines/{id}/metrics", metrics::show)
        .get("/v1/machines/{id}/file", files::download)
        .put("/v1/machines/{id}/file", files::upload)
        .get("/v1/machines/{id}/files", files::list)
        .post("/v1/machines/{id}/files/read", files::read)
        .post("/v1/machines/{id}/files/write", files::write)
        .post("/v1/machines/{id}/files/exists", files::exists)
        .post("/v1/machines/{id}/files/info", files::info)
        .post("/v1/machines/{id}/files/mkdir", files::make_dir)
        .post("/v1/machines/{id}/files/remove", files::remove)
        .post("/v1/machines/{id}/files/rename", files::rename)
        .post("/v1/machines/{id}/uploads", uploads::create)
        .get("/v1/machines/{id}/uploads/{upload_id}", uploads::show)
        .delete("/v1/machines/{id}/uploads/{upload_id}", uploads::abort)
        .put(
            "/v1/machines/{id}/uploads/{upload_id}/parts/{part_number}",
            uploads::put_part,
        )
        .post(
            "/v1/machines/{id}/uploads/{upload_id}/complete",
            uploads::complete,
        )
        .get("/v1/lifecycle/events", lifecycle::of_host)
        .get("/v1/lifecycle/ws", lifecycle::watch_host)
        .get("/v1/machines/{id}/lifecycle", lifecycle::of_machine)
        .get("/v1/machines/{id}/lifecycle/ws", lifecycle::watch_machine)
        .get("/v1/snapshots/{id}/lifecycle", lifecycle::of_snapshot)
        .post("/v1/machines/{id}/snapshots", snapshots::create)
        .post("/v1/machines/{id}/fork", snapshots::fork)
        .post("/v1/machines/{id}/ssh-access", ssh::grant)
        .get("/v1/snapshots", snapshots::list)
        .get("/v1/snapshots/{id}", snapshots::show)
        .delete("/v1/snapshots/{id}", snapshots::delete)
}

#[cfg(test)]
mod tests;
