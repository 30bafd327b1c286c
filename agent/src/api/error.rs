//! Failures to responses: the only place that does.

use crate::machine::error::MachineError;
use crate::store::StoreError;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use torpor_api::{ApiError, ErrorCode};

/// Seconds after which a request that failed for a passing reason may come again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("5");

/// A failed request.
#[derive(Debug, Clone)]
pub(super) struct Failure(ApiError);

impl Failure {
    pub(super) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ApiError::new(code, message))
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, message)
    }

    pub(super) fn into_api_error(self) -> ApiError {
        self.0
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        Self::new(error.code, error.message)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        MachineError::from(error).into()
    }
}

impl IntoResponse for Failure {
    /// The body is written when the request ID is known.
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response.extensions_mut().insert(self);
        response
    }
}

pub(super) async fn no_route(uri: Uri) -> Failure {
    Failure::new(ErrorCode::RouteNotFound, format!("no route {}", cut(uri.path())))
}

pub(super) async fn no_method(method: Method, uri: Uri) -> Failure {
    Failure::new(
        ErrorCode::MethodNotAllowed,
        format!("no method {method} on {}", cut(uri.path())),
    )
}

/// Hostile text, short enough for a message.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(128).collect()
}
