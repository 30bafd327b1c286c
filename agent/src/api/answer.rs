//! Answers that are no JSON with status 200, each a type, so that the OpenAPI documents know them.

use super::describe::{Answered, Description};
use axum::Json;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

/// Something new, as JSON.
pub(super) struct Created<T>(pub(super) T);

/// Done, and nothing to say.
pub(super) struct NoContent;

/// Bytes of a guest, which are no page of ours.
pub(super) struct Contents(pub(super) Body);

/// Text of a guest, likewise.
pub(super) struct Text(pub(super) String);

/// Metrics in the text format of Prometheus.
pub(super) struct OpenMetrics(pub(super) String);

/// Server-sent events.
pub(super) struct Events(pub(super) Response);

/// A WebSocket.
pub(super) struct Upgraded(pub(super) Response);

/// A WebSocket, or server-sent events for a client that asked for no upgrade.
pub(super) struct EitherStream(pub(super) Response);

impl<T: Serialize> IntoResponse for Created<T> {
    fn into_response(self) -> Response {
        (StatusCode::CREATED, Json(self.0)).into_response()
    }
}

impl IntoResponse for NoContent {
    fn into_response(self) -> Response {
        StatusCode::NO_CONTENT.into_response()
    }
}

fn of_guest(content_type: &'static str, body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, body).into_response()
}

impl IntoResponse for Contents {
    fn into_response(self) -> Response {
        of_guest("application/octet-stream", self.0)
    }
}

impl IntoResponse for Text {
    fn into_response(self) -> Response {
        of_guest("text/plain; charset=utf-8", Body::from(self.0))
    }
}

impl IntoResponse for OpenMetrics {
    fn into_response(self) -> Response {
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(header::CONTENT_TYPE, content_type)], self.0).into_response()
    }
}

impl IntoResponse for Events {
    fn into_response(self) -> Response {
        self.0
    }
}

impl IntoResponse for Upgraded {
    fn into_response(self) -> Response {
        self.0
    }
}

impl IntoResponse for EitherStream {
    fn into_response(self) -> Response {
        self.0
    }
}

impl Answered for NoContent {
    fn describe(into: &mut Description) {
        into.answer("204", "Done.", Value::Null);
    }
}

impl Answered for Contents {
    fn describe(into: &mut Description) {
        into.answer("200", "The bytes.", json!({ "application/octet-stream": {} }));
    }
}

impl Answered for Text {
    fn describe(into: &mut Description) {
        let content = json!({ "text/plain": { "schema": { "type": "string" } } });
        into.answer("200", "The text.", content);
    }
}

impl Answered for OpenMetrics {
    fn describe(into: &mut Description) {
        let content = json!({ "application/openmetrics-text": { "schema": { "type": "string" } } });
        into.answer("200", "The metrics.", content);
    }
}

impl Answered for Events {
    fn describe(into: &mut Description) {
        let content = json!({ "text/event-stream": { "schema": { "type": "string" } } });
        into.answer("200", "Events as they happen.", content);
    }
}

impl Answered for Upgraded {
    fn describe(into: &mut Description) {
        into.answer("101", "A WebSocket.", Value::Null);
    }
}

impl Answered for EitherStream {
    fn describe(into: &mut Description) {
        Upgraded::describe(into);
        Events::describe(into);
    }
}
