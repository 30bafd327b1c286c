//! The API of the `morphcloud` SDK: the fleet in its words.
//!
//! A machine is an instance, with one ID for life; a lease is a TTL in seconds; an exposed port is an HTTP service.
//! Every route is there with and without `/api` before it, because both are base URLs that people set. Most changes
//! answer the whole instance; the SDK reads it again all the same, so a change is visible when it is answered.
//!
//! Not its job: any behaviour. What an operation does is the fleet's; what is refused and why, too.

mod dialect;
mod exec;
mod images;
mod instances;
mod model;
mod policy;
mod snapshots;
mod ssh;

use super::auth::{self, Token};
use super::error;
use super::facade::{stamped, tidied, unbuilt};
use super::table::Table;
use crate::machine::fleet::Fleet;
use axum::Router;
use axum::middleware;

/// What the API is, is no secret.
const OPEN: &[&str] = &["/openapi/morph.json"];

/// Operations of the SDK that are not built.
const UNBUILT: &[(&str, &str)] = &[
    ("POST", "/instance/{id}/disk-resize"),
    ("GET", "/instance/{id}/disk-resize/{operation}"),
    ("GET", "/user/api-key"),
    ("POST", "/user/api-key"),
    ("DELETE", "/user/api-key/{key}"),
    ("GET", "/user/secret"),
    ("POST", "/user/secret"),
    ("DELETE", "/user/secret/{name}"),
    ("GET", "/user/ssh-key"),
    ("PUT", "/user/ssh-key"),
    ("GET", "/user/usage"),
];

/// The API behind a bearer token.
pub fn router(fleet: Fleet, token: Token) -> Router {
    let lock = auth::Lock { token, open: OPEN };
    let routes = routes(fleet).layer(middleware::from_fn_with_state(lock, auth::require));
    tidied(stamped(routes, dialect::shape), one_form)
}

/// `/api` before a path goes, and the plurals of the vendor's documentation become what the SDK sends.
fn one_form(segments: &mut Vec<&str>) {
    if segments.first() == Some(&"api") {
        segments.remove(0);
    }
    if let Some(first) = segments.first_mut() {
        *first = match *first {
            "instances" => "instance",
            "snapshots" => "snapshot",
            "images" => "image",
            other => other,
        };
    }
}

fn routes(fleet: Fleet) -> Router {
    let router = table().into_router::<dialect::ErrorBody>(
        "Torpor: the API of the morphcloud SDK",
        "/openapi/morph.json",
        OPEN,
    );
    unbuilt(router, UNBUILT)
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .with_state(fleet)
}

/// What is built.
pub(super) fn table() -> Table<Fleet> {
    Table::new()
        .get("/instance", instances::list)
        .post("/instance", instances::start)
        .get("/instance/list", instances::list_pages)
        .get("/instance/{id}", instances::show)
        .delete("/instance/{id}", instances::stop)
        .post("/instance/{id}/pause", instances::pause)
        .post("/instance/{id}/resume", instances::resume)
        .post("/instance/{id}/reboot", instances::reboot)
        .post("/snapshot/{id}/boot", instances::boot)
        .post("/instance/{id}/ttl", policy::set_ttl)
        .post("/instance/{id}/wake-on", policy::set_wake_on)
        .post("/instance/{id}/metadata", policy::set_metadata)
        .post("/instance/{id}/http", policy::expose)
        .delete("/instance/{id}/http/{name}", policy::hide)
        .post("/instance/{id}/exec", exec::run)
        .post("/instance/{id}/exec/sse", exec::stream)
        .post("/instance/{id}/snapshot", snapshots::of_instance)
        .post("/instance/{id}/branch", snapshots::branch)
        .get("/snapshot", snapshots::list)
        .post("/snapshot", snapshots::create)
        .get("/snapshot/list", snapshots::list_pages)
        .get("/snapshot/{id}", snapshots::show)
        .delete("/snapshot/{id}", snapshots::delete)
        .post("/snapshot/{id}/metadata", snapshots::set_metadata)
        .post("/snapshot/{id}/ttl", snapshots::set_ttl)
        .get("/instance/{id}/ssh/key", ssh::show)
        .post("/instance/{id}/ssh/key", ssh::rotate)
        .get("/user/ssh-keys", ssh::user_keys)
        .post("/user/ssh-keys", ssh::add_user_key)
        .get("/user/ssh-keys/{key}", ssh::user_key)
        .patch("/user/ssh-keys/{key}", ssh::change_user_key)
        .delete("/user/ssh-keys/{key}", ssh::remove_user_key)
        .get("/image", images::list)
}

#[cfg(test)]
mod tests;
