//! A client of the SDKs' APIs.

use super::{Answer, send};
use crate::api::auth::Token;
use crate::machine::tests::World;
use axum::Router;
use serde_json::Value;

/// What every request shows.
pub(in crate::api) const KEY: &str = "Bearer secret";

/// The token that [`KEY`] shows.
pub(in crate::api) fn token(world: &World) -> Token {
    let path = world.directory.path().join("token");
    std::fs::write(&path, "secret").unwrap();
    Token::read(&path).unwrap()
}

/// As the SDKs send it: always a JSON content type, with or without a body.
pub(in crate::api) async fn call(router: &Router, method: &str, path: &str, body: Value) -> Answer {
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let headers = [("authorization", KEY), ("content-type", "application/json")];
    send(router, method, path, body, &headers).await
}
