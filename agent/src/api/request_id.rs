//! The request ID: made here, logged, sent as `x-request-id` and written into error bodies, whose shape is the
//! served API's.

use super::error::Failure;
use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use torpor_api::ApiError;
use tracing::Instrument;

/// How an API writes errors: the status and the body.
pub(super) type Shape = fn(ApiError) -> (u16, Value);

/// The native API's.
pub(super) fn native(error: ApiError) -> (u16, Value) {
    (error.code.status(), json!(error))
}

pub(super) async fn stamp(State(shape): State<Shape>, request: Request, next: Next) -> Response {
    let random: u64 = rand::random();
    let request_id = format!("req_{random:016x}");
    let method = request.method().clone();
    let path = super::error::cut(request.uri().path());
    let span = tracing::info_span!("request", %request_id, %method, path);
    let mut response = next.run(request).instrument(span.clone()).await;
    if let Some(failure) = response.extensions_mut().remove::<Failure>() {
        response = with_body(response, failure, shape, &request_id, &span);
    }
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

fn with_body(
    response: Response,
    failure: Failure,
    shape: Shape,
    request_id: &str,
    span: &tracing::Span,
) -> Response {
    let mut error = failure.into_api_error();
    error.request_id = request_id.to_owned();
    span.in_scope(|| {
        if response.status() >= StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(code = error.code.as_str(), error = error.error, "request failed");
        } else {
            tracing::debug!(code = error.code.as_str(), error = error.error, "request refused");
        }
    });
    let (parts, _) = response.into_parts();
    let (status, body) = shape(error);
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut full = (status, Json(body)).into_response();
    for (name, value) in &parts.headers {
        // What this API has for a conflict may be the native one's 503, after which a client would wait in vain.
        let misplaced = name == RETRY_AFTER && status != StatusCode::SERVICE_UNAVAILABLE;
        if name != CONTENT_LENGTH && !misplaced {
            full.headers_mut().insert(name, value.clone());
        }
    }
    full
}
