//! Extractors whose refusals have the API's one error shape.

use super::error::Failure;
use crate::machine::fleet::Fleet;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header;
use axum::http::request::Parts;
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;
use torpor_api::{ErrorCode, MachineId, limits};

/// A client that sends too much is read up to here, so that it gets to read the answer.
pub(super) const MOST_DISCARDED: usize = 16 << 20;

/// A JSON object. A missing body is an error.
pub(super) struct Json<T>(pub(super) T);

/// A JSON object that holds a file's content.
pub(super) struct LargeJson<T>(pub(super) T);

/// A JSON object, or nothing at all.
pub(super) struct OptionalJson<T>(pub(super) T);

/// The bytes and the value of a JSON object.
pub(super) struct RawJson<T>(pub(super) Bytes, pub(super) T);

/// The query, without unknown keys.
pub(super) struct Query<T>(pub(super) T);

/// What is between the braces of the path, in order.
pub(super) struct Path<T>(pub(super) T);

/// The machine that `{id}` names: an ID, an alias or a name.
pub(super) struct Named(pub(super) MachineId);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Failure;
    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        parse(&read(request).await?).map(Self)
    }
}

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for LargeJson<T> {
    type Rejection = Failure;
    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        parse(&read_up_to(request, MOST_DISCARDED).await?).map(Self)
    }
}

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for RawJson<T> {
    type Rejection = Failure;
    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let body = read(request).await?;
        parse(&body).map(|value| Self(body, value))
    }
}

impl<S: Sync, T: DeserializeOwned + Default> FromRequest<S> for OptionalJson<T> {
    type Rejection = Failure;
    async fn from_request(request: Request, _: &S) -> Result<Self, Failure> {
        let body = read(request).await?;
        if body.trim_ascii().is_empty() {
            Ok(Self(T::default()))
        } else {
            parse(&body).map(Self)
        }
    }
}

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|error| Failure::invalid(error.body_text()))
    }
}

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let path = axum::extract::Path::from_request_parts(parts, state).await;
        path.map(|axum::extract::Path(value)| Self(value))
            .map_err(|error| Failure::invalid(error.body_text()))
    }
}

impl FromRequestParts<Fleet> for Named {
    type Rejection = Failure;
    async fn from_request_parts(parts: &mut Parts, fleet: &Fleet) -> Result<Self, Failure> {
        let Path(names) = Path::<Vec<(String, String)>>::from_request_parts(parts, fleet).await?;
        let text = names
            .into_iter()
            .find(|(key, _)| key == "id")
            .map(|(_, text)| text)
            .unwrap_or_default();
        Ok(Self(fleet.resolve(&text).await?))
    }
}

async fn read(request: Request) -> Result<Bytes, Failure> {
    read_up_to(request, limits::MAX_JSON_BODY).await
}

async fn read_up_to(request: Request, most_bytes: usize) -> Result<Bytes, Failure> {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let is_json = content_type.is_none_or(|value| {
        let essence = value
            .as_bytes()
            .split(|byte| *byte == b';')
            .next()
            .unwrap_or_default();
        essence.trim_ascii().eq_ignore_ascii_case(b"application/json")
    });
    let body = Limited::new(request.into_body(), MOST_DISCARDED).collect().await;
    let body = body.map_err(|_| too_large(most_bytes))?.to_bytes();
    if body.len() > most_bytes {
        return Err(too_large(most_bytes));
    }
    if !is_json && !body.is_empty() {
        return Err(Failure::invalid(
            "the body's content type is not application/json",
        ));
    }
    Ok(body)
}

fn too_large(most_bytes: usize) -> Failure {
    Failure::new(
        ErrorCode::BodyTooLarge,
        format!("the body is larger than {most_bytes} bytes"),
    )
}

/// serde takes an array for a struct; the API does not.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(Failure::invalid("the body is not a JSON object"));
    }
    serde_json::from_slice(body).map_err(|error| Failure::invalid(format!("the body is not valid: {error}")))
}
