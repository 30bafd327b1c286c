//! Routes as a table: what is served and what is said of it come from the same lines.
//!
//! A [`Table`] is a router that remembers its routes. From them it makes the OpenAPI document that the router serves,
//! and tests compare the documentation with them.

use super::describe::{Described, Description};
use axum::handler::Handler;
use axum::http::Method;
use axum::routing::{MethodFilter, on};
use axum::{Json, Router};
use serde_json::{Map, Value, json};
use utoipa::PartialSchema;

/// One route.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) method: Method,
    pub(super) path: String,
    /// Path of the handler's function below its API.
    pub(super) handler: String,
    pub(super) description: Description,
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

    fn add<H: Handler<T, S> + Described<T>, T: 'static>(
        mut self,
        method: Method,
        path: &str,
        handler: H,
    ) -> Self {
        let name = std::any::type_name::<H>();
        let name = name.rsplit_once("::api::").map_or(name, |(_, name)| name);
        self.routes.push(Route {
            method: method.clone(),
            path: path.to_owned(),
            handler: name.replace("::", "."),
            description: H::description(),
        });
        if let Ok(filter) = MethodFilter::try_from(method) {
            self.router = self.router.route(path, on(filter, handler));
        }
        self
    }

    pub(super) fn get<H: Handler<T, S> + Described<T>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::GET, path, handler)
    }

    pub(super) fn post<H: Handler<T, S> + Described<T>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::POST, path, handler)
    }

    pub(super) fn put<H: Handler<T, S> + Described<T>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::PUT, path, handler)
    }

    pub(super) fn patch<H: Handler<T, S> + Described<T>, T: 'static>(self, path: &str, handler: H) -> Self {
        self.add(Method::PATCH, path, handler)
    }

    pub(super) fn delete<H: Handler<T, S> + Described<T>, T: 'static>(self, path: &str, handler: H) -> Self {
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

    /// The router, which serves the document of its own routes at `path`; its failures have the schema of `E`, and
    /// `open` are the paths that need no token.
    pub(super) fn into_router<E: PartialSchema>(self, title: &str, path: &str, open: &[&str]) -> Router<S> {
        let mut document = document(title, &self.routes, json!(E::schema()));
        for path in open {
            if let Some(operation) = document["paths"]
                .get_mut(path)
                .and_then(|path| path.get_mut("get"))
            {
                operation["security"] = json!([]);
            }
        }
        self.router.route(
            path,
            axum::routing::get(move || {
                let document = document.clone();
                async move { Json(document) }
            }),
        )
    }
}

/// Names between braces, with the schemas of those that are no texts.
fn in_path(path: &str, schemas: &[Value]) -> Vec<Value> {
    let names = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let text = json!({ "type": "string" });
    let named = names.enumerate().map(|(index, name)| {
        let schema = schemas.get(index).unwrap_or(&text);
        json!({ "name": name, "in": "path", "required": true, "schema": schema })
    });
    named.collect()
}

fn operation(route: &Route) -> Value {
    let (module, name) = route.handler.rsplit_once('.').unwrap_or_default();
    let description = &route.description;
    let mut responses = description.responses.clone();
    responses.insert(
        "default".to_owned(),
        json!({
            "description": "Refused or failed; the code says why.",
            "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } },
        }),
    );
    let mut parameters = in_path(&route.path, &description.in_path);
    parameters.extend(description.parameters.iter().cloned());
    let mut operation = json!({
        "operationId": format!("{module}_{name}_{}", route.method.as_str().to_ascii_lowercase()).replace('.', "_"),
        "tags": [module],
        "parameters": parameters,
        "responses": responses,
    });
    if let Some(body) = &description.body {
        operation["requestBody"] = body.clone();
    }
    operation
}

/// The OpenAPI document of these routes, whose failures have this schema.
fn document(title: &str, routes: &[Route], error: Value) -> Value {
    let mut paths: Map<String, Value> = Map::new();
    let mut schemas: Map<String, Value> = Map::new();
    for route in routes {
        let path = paths.entry(route.path.clone()).or_insert_with(|| json!({}));
        path[route.method.as_str().to_ascii_lowercase()] = operation(route);
        let named = route.description.schemas.iter();
        schemas.extend(named.map(|(name, schema)| (name.clone(), schema.clone())));
    }
    schemas.insert("Error".to_owned(), error);
    json!({
        "openapi": "3.1.0",
        "info": { "title": title, "version": env!("CARGO_PKG_VERSION") },
        "security": [{ "token": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            "schemas": schemas,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::answer::NoContent;
    use super::super::error::Failure;
    use super::super::extract::Path;
    use super::*;
    use std::collections::BTreeMap;

    async fn one(_: Path<(String, u16)>) -> NoContent {
        NoContent
    }

    #[test]
    fn the_document_has_every_route_and_its_parameters() {
        let table = Table::<()>::new()
            .get("/a/{id}/b/{n}", one)
            .post("/a/{id}/b/{n}", one);
        let document = document("t", &table.routes, json!({}));
        let path = &document["paths"]["/a/{id}/b/{n}"];
        let parameters = &path["get"]["parameters"];
        assert_eq!(
            (
                &parameters[0]["schema"]["type"],
                &parameters[1]["name"],
                &parameters[1]["schema"]["type"]
            ),
            (&json!("string"), &json!("n"), &json!("integer"))
        );
        assert!(path["post"]["responses"]["204"].is_object());
    }

    /// References of a value, to wherever.
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(object) => {
                if let Some(Value::String(to)) = object.get("$ref") {
                    found.push(to.clone());
                }
                object.values().for_each(|value| references(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn names_of_schemas_are_taken_once_and_every_reference_leads_somewhere() {
        let native = super::super::table().routes;
        for routes in [
            native,
            super::super::morph::table().routes,
            super::super::nullspace::table().routes,
        ] {
            let mut named: BTreeMap<&String, &Value> = BTreeMap::new();
            let schemas = routes.iter().flat_map(|route| &route.description.schemas);
            let taken = schemas.filter(|(name, schema)| {
                let before = named.insert(name, schema);
                before.is_some_and(|before| before != *schema)
            });
            let taken: Vec<_> = taken.map(|(name, _)| name).collect();
            assert!(taken.is_empty(), "several schemas have one name: {taken:?}");
            let document = document("t", &routes, json!({}));
            let mut found = Vec::new();
            references(&document, &mut found);
            assert!(!found.is_empty());
            for to in found {
                let pointer = to.strip_prefix('#').unwrap();
                assert!(document.pointer(pointer).is_some(), "{to} leads nowhere");
            }
        }
    }

    #[test]
    fn every_operation_has_an_id_of_its_own_and_a_schema_of_what_it_answers() {
        let native = super::super::table().routes;
        for routes in [
            native,
            super::super::morph::table().routes,
            super::super::nullspace::table().routes,
        ] {
            let mut ids = std::collections::BTreeSet::new();
            for route in &routes {
                let operation = operation(route);
                let id = operation["operationId"].as_str().unwrap().to_owned();
                assert!(ids.insert(id.clone()), "{id} is there twice");
                let json = operation.pointer("/responses/200/content/application~1json/schema");
                assert!(
                    json.is_none_or(|schema| *schema != json!({})),
                    "{id} says nothing of its answer"
                );
                let answers = operation["responses"].as_object().unwrap().len();
                assert!(answers > 1, "{id} only fails");
            }
        }
    }

    #[test]
    fn a_failure_is_what_the_document_says() {
        let schema = json!(<torpor_api::ApiError as utoipa::PartialSchema>::schema());
        let failure = json!(Failure::invalid("x").into_api_error());
        for key in failure.as_object().unwrap().keys() {
            assert!(schema["properties"][key].is_object(), "{key}");
        }
    }
}
