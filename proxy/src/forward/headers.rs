//! Which header fields end at the proxy, and the one that it may add.
//!
//! Only the fields that speak of the connection itself are taken off (RFC 9110, 7.6.1). `Transfer-Encoding`,
//! `TE` and `Trailer` stay, since framing, trailers and their announcement are passed on as they are.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Uri, Version};
use std::fmt::Write as _;
use std::time::Duration;

use super::tunnel::Framing;
use crate::waker::WakeTrace;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Fields that a `Connection` header must not take off: without them the message would mean something else.
const NEVER_NOMINATED: [HeaderName; 6] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::EXPECT,
];

/// Whether a client asks to speak something else on its connection.
pub(crate) fn asks_for_upgrade(parts: &Parts) -> bool {
    parts.version == Version::HTTP_11
        && parts.headers.contains_key(header::UPGRADE)
        && nominated(&parts.headers).any(|name| name == header::UPGRADE)
}

/// What passes through once the connection is upgraded.
pub(super) fn framing(parts: &Parts) -> Framing {
    let websocket = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"websocket");
    if parts.headers.get(header::UPGRADE).is_some_and(websocket) {
        Framing::WebSocket
    } else {
        Framing::None
    }
}

pub(crate) fn expects_continue(headers: &HeaderMap) -> bool {
    headers
        .get(header::EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Makes a client's request one for the guest. An absolute-form target becomes origin-form and its authority
/// the `Host` (RFC 9112, 3.2.2), so that router and guest can't read two different hosts.
pub(crate) fn towards_guest(parts: &mut Parts, upgrade: bool) {
    if let Some(authority) = parts.uri.authority() {
        let host = HeaderValue::from_str(authority.host_and_port());
        let path = parts
            .uri
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| PathAndQuery::from_static("/"));
        if let Ok(host) = host {
            parts.headers.insert(header::HOST, host);
        }
        parts.uri = Uri::from(path);
    }
    if !upgrade {
        strip_hop_by_hop(&mut parts.headers);
    }
    if parts.version == Version::HTTP_2 {
        parts.version = Version::HTTP_11;
        join_cookies(&mut parts.headers);
    }
}

/// HTTP/2 may send each cookie as a field of its own; HTTP/1.1 may not (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers
        .get_all(header::COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if cookies.len() < 2 {
        return;
    }
    if let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Makes a guest's response one for the client.
pub(crate) fn towards_client(headers: &mut HeaderMap) {
    strip_hop_by_hop(headers);
}

trait HostAndPort {
    fn host_and_port(&self) -> &str;
}

impl HostAndPort for http::uri::Authority {
    fn host_and_port(&self) -> &str {
        self.as_str()
            .rsplit_once('@')
            .map_or(self.as_str(), |(_userinfo, rest)| rest)
    }
}

fn nominated(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|b| *b == b','))
        .filter_map(|token| HeaderName::from_bytes(token.trim_ascii()).ok())
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = nominated(headers)
        .filter(|name| !NEVER_NOMINATED.contains(name))
        .collect();
    let ends_here = |name: &HeaderName| {
        [header::CONNECTION, header::UPGRADE, KEEP_ALIVE, PROXY_CONNECTION].contains(name)
            || named.contains(name)
    };
    if !headers.keys().any(ends_here) {
        return;
    }
    // Built anew: HeaderMap::remove would put the last field in the gap and so change the order.
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers.iter() {
        if !ends_here(name) {
            kept.append(name.clone(), value.clone());
        }
    }
    *headers = kept;
}

/// Appends how long a wake took, in all and by stage, in milliseconds.
pub(crate) fn add_server_timing(
    headers: &mut HeaderMap,
    total: Duration,
    accept: Duration,
    trace: &WakeTrace,
) {
    let mut text = String::new();
    let own = [("torpor-wake", total), ("accept", accept)];
    for (stage, duration) in own.iter().chain(&trace.stages) {
        let separator = if text.is_empty() { "" } else { ", " };
        // Writing to a String does not fail.
        let _ = write!(
            text,
            "{separator}{stage};dur={:.3}",
            duration.as_secs_f64() * 1000.0
        );
    }
    if let Ok(value) = HeaderValue::from_str(&text) {
        headers.append(SERVER_TIMING, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn parts(uri: &str, fields: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        headers.keys().map(HeaderName::as_str).collect()
    }

    #[test]
    fn what_speaks_of_the_connection_ends_here_and_the_rest_keeps_its_order() {
        let mut parts = parts(
            "/",
            &[
                ("host", "h"),
                ("connection", "keep-alive, X-Mine"),
                ("keep-alive", "timeout=5"),
                ("x-mine", "1"),
                ("te", "trailers"),
                ("a", "1"),
                ("b", "2"),
                ("proxy-connection", "keep-alive"),
                ("c", "3"),
            ],
        );
        towards_guest(&mut parts, false);
        assert_eq!(names(&parts.headers), ["host", "te", "a", "b", "c"]);
    }

    #[test]
    fn nothing_that_gives_the_message_its_meaning_can_be_nominated_away() {
        let mut parts = parts(
            "/",
            &[
                ("host", "h"),
                ("content-length", "3"),
                ("connection", "host, Content-Length"),
            ],
        );
        towards_guest(&mut parts, false);
        assert_eq!(names(&parts.headers), ["host", "content-length"]);
    }

    #[test]
    fn an_absolute_target_becomes_the_host() {
        let mut parts = parts("http://user@real:81/p?q=%20", &[("host", "decoy")]);
        towards_guest(&mut parts, false);
        assert_eq!(parts.uri, "/p?q=%20");
        assert_eq!(parts.headers[header::HOST], "real:81");
        assert_eq!(parts.headers.get_all(header::HOST).iter().count(), 1);
    }

    #[test]
    fn an_upgrade_needs_both_fields() {
        assert!(asks_for_upgrade(&parts(
            "/",
            &[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]
        )));
        assert!(!asks_for_upgrade(&parts("/", &[("upgrade", "websocket")])));
        assert!(!asks_for_upgrade(&parts("/", &[("connection", "upgrade")])));
    }

    #[test]
    fn the_wakes_timing_is_added_to_the_guests() {
        let mut headers = HeaderMap::new();
        headers.insert(SERVER_TIMING, HeaderValue::from_static("db;dur=5"));
        let trace = WakeTrace {
            stages: vec![("state_loaded", Duration::from_micros(1500))],
        };
        add_server_timing(
            &mut headers,
            Duration::from_millis(12),
            Duration::from_micros(40),
            &trace,
        );
        let values: Vec<_> = headers.get_all(SERVER_TIMING).iter().collect();
        assert_eq!(
            values,
            [
                "db;dur=5",
                "torpor-wake;dur=12.000, accept;dur=0.040, state_loaded;dur=1.500"
            ]
        );
    }
}
