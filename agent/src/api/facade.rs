//! What the APIs of this crate share as servers: stamped requests, tidied paths, operations known and not built.
//!
//! Not its job: the words of any of them.

pub(super) mod text;

use super::error::{Failure, cut};
use super::request_id::{self, Shape};
use crate::machine::fleet::Fleet;
use axum::Router;
use axum::extract::Request;
use axum::http::uri::PathAndQuery;
use axum::http::{Method, Uri};
use axum::middleware;
use axum::routing::{MethodFilter, on};
use torpor_api::ErrorCode;
use tower::util::MapRequest;

/// Request IDs and error bodies in this shape.
pub(super) fn stamped(router: Router, shape: Shape) -> Router {
    router.layer(middleware::from_fn_with_state(shape, request_id::stamp))
}

/// The size of a disk that callers ask for as the least they need: never below the template's own.
pub(super) async fn disk_mib(fleet: &Fleet, template: &str, least_mib: Option<u32>) -> Option<u32> {
    let template = fleet.hypervisor().template(template).await;
    let own_mib = template.map_or(0, |template| template.disk_mib);
    least_mib.map(|least_mib| least_mib.max(own_mib))
}

/// What an API does to the segments of a path before they are routed.
pub(super) type Segments = fn(&mut Vec<&str>);

/// Clients join a base URL and a path in their own ways: every path is brought into the one form that has a route,
/// without doubled slashes and a trailing slash.
pub(super) fn tidied(router: Router, segments: Segments) -> Router {
    let inner = MapRequest::new(router, move |mut request: Request| {
        if let Some(uri) = tidy(request.uri(), segments) {
            *request.uri_mut() = uri;
        }
        request
    });
    Router::new().fallback_service(inner)
}

fn tidy(uri: &Uri, rewrite: Segments) -> Option<Uri> {
    let mut segments: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
    rewrite(&mut segments);
    let mut text = format!("/{}", segments.join("/"));
    if text == uri.path() {
        return None;
    }
    if let Some(query) = uri.query() {
        text.push('?');
        text.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(text.parse::<PathAndQuery>().ok()?);
    Uri::from_parts(parts).ok()
}

/// Routes of operations that the SDK has and this version does not: they answer `not_implemented`, never a bare
/// 404.
pub(super) fn unbuilt<S: Clone + Send + Sync + 'static>(
    router: Router<S>,
    routes: &[(&str, &str)],
) -> Router<S> {
    routes.iter().fold(router, |router, (method, path)| {
        let filter = method
            .parse::<Method>()
            .ok()
            .and_then(|method| MethodFilter::try_from(method).ok());
        match filter {
            Some(filter) => router.route(path, on(filter, not_implemented)),
            None => router,
        }
    })
}

async fn not_implemented(method: Method, uri: Uri) -> Failure {
    Failure::new(
        ErrorCode::NotImplemented,
        format!("{method} {} is not implemented", cut(uri.path())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_come_to_one_form() {
        for (sent, routed) in [
            ("/instances/x?a=1", Some("/instance/x?a=1")),
            ("//instance//x", Some("/instance/x")),
            ("/instance/", Some("/instance")),
            ("/instance/x", None),
            ("//", Some("/")),
            ("/", None),
        ] {
            let tidied = tidy(&sent.parse().unwrap(), |segments| {
                segments
                    .iter_mut()
                    .filter(|part| **part == "instances")
                    .for_each(|part| *part = "instance");
            });
            assert_eq!(tidied.map(|uri| uri.to_string()).as_deref(), routed, "{sent}");
        }
    }
}
