//! Routes as a table: what is served and what is said of it come from the same lines.
//!
//! A [`Table`] is a router that remembers its routes. From them it makes the OpenAPI document that the router serves,
//! and tests compare the documentation with them.

use axum::handler::Handler;
use axum::http::Method;
use axum::routing::{MethodFilter, on};
use axum::{Json, Router};
use serde_json::{Map, Value, json};

/// One route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) method: Method,
    pub(super) path: String,
    /// Path of the handler's function below its API.
    pub(super) handler: String,
}

/// A router, and its routes.
pub(super) struct Table<S> {
    router: Router<S>,
    pub(super) routes: Vec<Route>,
}

impl<S: Clone + Send + Sync + 'static> Table<S> {
    pub(super) fn new() -> Self {
        Self {
            router: Router::new(),
            routes: Vec::new(),
        }
    }

    fn add<H: Handler<T, S>, T: 'static>(mut self, method: Method, path: &str, handler: H) -> Self {
        let name = std::any::type_name::<H>();
        let name = name.rsplit_once("::api::").map_or(name, |(_, name)| name);
        self.routes.push(Route {
            method: method.clone(),
            path: path.to_owned(),
            handler: name.replace("::", "."),
        });
        if let Ok(filter) = MethodFilter::try_from(method) {
            self.router = self.router.route(path, on(filter, handler));
        }
        self
    }

    pub(super) fn get<H: Handler<T, S>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::GET, path, handler)
    }

    pub(super) fn post<H: Handler<T, S>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::POST, path, handler)
    }

    pub(super) fn put<H: Handler<T, S>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::PUT, path, handler)
    }

    pub(super) fn patch<H: Handler<T, S>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::PATCH, path, handler)
    }

    pub(super) fn delete<H: Handler<T, S>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::DELETE, path, handler)
    }

    /// Every route as `METHOD /path`, for what is compared with them.
    #[cfg(test)]
    pub(super) fn lines(&self) -> Vec<String> {
        let routes = self.routes.iter();
        routes
            .map(|route| format!("{} {}", route.method, route.path))
            .collect()
    }

    /// The router, which serves the document of its own routes at `path`.
    pub(super) fn into_router(self, title: &str, path: &str) -> Router<S> {
        let document = document(title, &self.routes);
        self.router.route(
            path,
            axum::routing::get(move || {
                let document = document.clone();
                async move { Json(document) }
            }),
        )
    }
}

/// Names between braces.
fn parameters(path: &str) -> Vec<Value> {
    let named = path.split('/').filter_map(|part| {
        let name = part.strip_prefix('{')?.strip_suffix('}')?;
        Some(json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
    });
    named.collect()
}

fn operation(route: &Route) -> Value {
    let name = route.handler.rsplit_once('.').map_or("", |(module, _)| module);
    let mut operation = json!({
        "operationId": format!("{} {} ({})", route.method, route.path, route.handler),
        "tags": [name],
        "parameters": parameters(&route.path),
        "responses": {
            "2XX": { "description": "Done." },
            "default": {
                "description": "Refused or failed; see `code`.",
                "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } },
            },
        },
    });
    if matches!(route.method, Method::POST | Method::PUT | Method::PATCH) {
        operation["requestBody"] = json!({
            "required": false,
            "content": { "application/json": { "schema": { "type": "object" } } },
        });
    }
    operation
}

/// The OpenAPI document of these routes.
fn document(title: &str, routes: &[Route]) -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for route in routes {
        let path = paths.entry(route.path.clone()).or_insert_with(|| json!({}));
        path[route.method.as_str().to_ascii_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": { "title": title, "version": env!("CARGO_PKG_VERSION") },
        "security": [{ "token": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["code", "retryable", "suggested_action"],
                    "properties": {
                        "code": { "type": "string" },
                        "retryable": { "type": "boolean" },
                        "suggested_action": { "type": "string" },
                        "request_id": { "type": "string" },
                    },
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn nothing() {}

    #[test]
    fn the_document_has_every_route_and_its_parameters() {
        let table = Table::<()>::new()
            .get("/a/{id}/b/{n}", nothing)
            .post("/a/{id}/b/{n}", nothing);
        let document = document("t", &table.routes);
        let path = &document["paths"]["/a/{id}/b/{n}"];
        assert_eq!(path["get"]["parameters"][1]["name"], "n");
        assert!(path["get"].get("requestBody").is_none());
        assert!(path["post"]["requestBody"].is_object());
    }
}
