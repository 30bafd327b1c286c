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
use crate::machine::fleet::Fleet;
use axum::Router;
use axum::middleware;
use axum::routing::{delete, get, post};

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
    let lock = auth::Lock { token, open: &[] };
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
    let router = Router::new()
        .route("/instance", get(instances::list).post(instances::start))
        .route("/instance/list", get(instances::list_pages))
        .route("/instance/{id}", get(instances::show).delete(instances::stop))
        .route("/instance/{id}/pause", post(instances::pause))
        .route("/instance/{id}/resume", post(instances::resume))
        .route("/instance/{id}/reboot", post(instances::reboot))
        .route("/snapshot/{id}/boot", post(instances::boot))
        .route("/instance/{id}/ttl", post(policy::set_ttl))
        .route("/instance/{id}/wake-on", post(policy::set_wake_on))
        .route("/instance/{id}/metadata", post(policy::set_metadata))
        .route("/instance/{id}/http", post(policy::expose))
        .route("/instance/{id}/http/{name}", delete(policy::hide))
        .route("/instance/{id}/exec", post(exec::run))
        .route("/instance/{id}/exec/sse", post(exec::stream))
        .route("/instance/{id}/snapshot", post(snapshots::of_instance))
        .route("/instance/{id}/branch", post(snapshots::branch))
        .route("/snapshot", get(snapshots::list).post(snapshots::create))
        .route("/snapshot/list", get(snapshots::list_pages))
        .route("/snapshot/{id}", get(snapshots::show).delete(snapshots::delete))
        .route("/snapshot/{id}/metadata", post(snapshots::set_metadata))
        .route("/snapshot/{id}/ttl", post(snapshots::set_ttl))
        .route("/instance/{id}/ssh/key", get(ssh::show).post(ssh::rotate))
        .route("/user/ssh-keys", get(ssh::user_keys).post(ssh::add_user_key))
        .route(
            "/user/ssh-keys/{key}",
            get(ssh::user_key)
                .patch(ssh::change_user_key)
                .delete(ssh::remove_user_key),
        )
        .route("/image", get(images::list));
    unbuilt(router, UNBUILT)
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .with_state(fleet)
}

#[cfg(test)]
mod tests;
