//! The one place that turns an error into a response.
//!
//! Every error answer is an [`ApiError`] as JSON; every 503 says when to come again.

use crate::meter::ResponseBody;
use crate::waker::{DEFAULT_RETRY_AFTER, OwnAnswer, WakeRefusal};
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use std::fmt::Write as _;
use torpor_api::{ApiError, ErrorCode};

/// The response that tells a client of a refusal.
pub(crate) fn refusal(refusal: &WakeRefusal) -> Response<ResponseBody> {
    if let Some(own) = &refusal.answer {
        return configured(own);
    }
    let (status, body, retry_after_seconds) = parts(refusal);
    let mut response = Response::new(ResponseBody::own(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = retry_after_seconds {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

fn configured(own: &OwnAnswer) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::own(Bytes::from(own.body.clone())));
    *response.status_mut() = StatusCode::from_u16(own.status).unwrap_or(StatusCode::NO_CONTENT);
    if let Ok(content_type) = HeaderValue::from_str(&own.content_type)
        && !own.body.is_empty()
    {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    }
    response
}

/// The same as the bytes of a whole HTTP/1.1 response, for connections that no server task takes on.
pub(crate) fn refusal_bytes(refusal: &WakeRefusal) -> Vec<u8> {
    let (status, body, retry_after_seconds) = parts(refusal);
    let mut text = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n");
    if let Some(seconds) = retry_after_seconds {
        // Writing to a String does not fail.
        let _ = write!(text, "retry-after: {seconds}\r\n");
    }
    let _ = write!(
        text,
        "content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    text.into_bytes()
}

/// What a client is told instead of a bare refusal of hyper's own; `None` if the bytes are not one.
pub(crate) fn instead_of(bytes: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let head = text.strip_suffix("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.1 ")?;
    let own = |line: &str| matches!(line, "content-length: 0" | "connection: close");
    if !lines.all(own) {
        return None;
    }
    let (code, message) = match status.get(..3)? {
        "400" => (ErrorCode::InvalidRequest, "the request's head is not HTTP"),
        "414" | "431" => (
            ErrorCode::HeadTooLarge,
            "the request's head is larger than the proxy takes",
        ),
        _ => return None,
    };
    Some(refusal_bytes(&WakeRefusal::new(code, message)))
}

fn parts(refusal: &WakeRefusal) -> (StatusCode, String, Option<u64>) {
    let code = refusal.code;
    let status = StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut error = ApiError::new(code, refusal.message.clone());
    error.request_id = request_id();
    if code == ErrorCode::Internal {
        tracing::error!(request_id = error.request_id, "{}", error.error);
    } else {
        tracing::debug!(
            request_id = error.request_id,
            code = code.as_str(),
            "{}",
            error.error
        );
    }
    let retry_after = refusal
        .retry_after
        .or_else(|| (status == StatusCode::SERVICE_UNAVAILABLE).then_some(DEFAULT_RETRY_AFTER));
    // Rounded up: Retry-After has whole seconds, and 0 would invite a busy loop.
    let seconds = retry_after.map(|after| after.as_millis().div_ceil(1000).clamp(1, 86_400));
    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok());
    (status, serde_json::to_string(&error).unwrap_or_default(), seconds)
}

fn request_id() -> String {
    format!("req_{:020x}", rand::random::<u128>() >> 48)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_code_becomes_the_one_json_shape_and_every_503_says_when() {
        for code in ErrorCode::ALL {
            let (status, body, retry_after) = parts(&WakeRefusal::new(*code, "no"));
            assert_eq!(status.as_u16(), code.status());
            let error: ApiError = serde_json::from_str(&body).unwrap();
            assert_eq!((error.code, error.retryable), (*code, code.retryable()));
            assert_eq!(error.request_id.len(), 24);
            assert_eq!(retry_after, (code.status() == 503).then_some(5), "{code:?}");
        }
    }

    #[test]
    fn a_retry_delay_is_rounded_up_to_whole_seconds() {
        let mut no = WakeRefusal::new(ErrorCode::TransitionInProgress, "busy");
        no.retry_after = Some(Duration::from_millis(1));
        assert_eq!(parts(&no).2, Some(1));
        no.retry_after = Some(Duration::from_millis(2001));
        assert_eq!(parts(&no).2, Some(3));
    }
}
