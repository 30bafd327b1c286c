//! Who is let in: what a request shows, taken off before the guest sees it, and the cookie that a browser gets.
//!
//! Parsing only. Whether what is shown is enough is the waker's to say. Cookies of ours never reach a guest: one
//! host has many services on many ports, and cookies do not tell ports apart.

use super::http::Privacy;
use crate::waker::{Admission, Shown};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;

const QUERY_KEY: &str = "edge_token";
const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-edge-token");
const COOKIE_PREFIX: &str = "torpor_edge_";

/// What the request shows.
pub(super) fn shown(parts: &Parts, upgrade: bool) -> Shown {
    let text = |name: &HeaderName| {
        let value = parts.headers.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    Shown {
        query_token: parts.uri.query().and_then(query_token),
        header_token: text(&TOKEN_HEADER),
        cookies: cookies(&parts.headers),
        authorization: text(&header::AUTHORIZATION),
        upgrade,
    }
}

/// Takes off what was for the edge and not for the guest.
pub(super) fn take_off(parts: &mut Parts, admission: &Admission) {
    if admission.took_token {
        strip_query(parts);
        remove(&mut parts.headers, &TOKEN_HEADER);
    }
    if admission.took_authorization {
        remove(&mut parts.headers, &header::AUTHORIZATION);
    }
    strip_cookies(&mut parts.headers);
}

/// The `Set-Cookie` that lets relative links of a page work.
pub(super) fn set_cookie(admission: &Admission, privacy: Privacy) -> Option<HeaderValue> {
    let cookie = admission.cookie.as_ref()?;
    let secure = match privacy {
        Privacy::Plain => "",
        Privacy::Tls => "; Secure",
    };
    let text = format!(
        "{COOKIE_PREFIX}{}={}; Path=/; Max-Age={}; HttpOnly; SameSite=Lax{secure}",
        cookie.scope, cookie.value, cookie.max_age_seconds
    );
    HeaderValue::from_str(&text).ok()
}

/// The first value of our key; a client that percent-escapes what needs none is not one of ours.
fn query_token(query: &str) -> Option<String> {
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .find(|(key, _)| *key == QUERY_KEY)
        .map(|(_, value)| value.to_owned())
}

fn is_token_pair(pair: &str) -> bool {
    pair.split_once('=').map_or(pair, |(key, _)| key) == QUERY_KEY
}

fn strip_query(parts: &mut Parts) {
    let Some(query) = parts
        .uri
        .query()
        .filter(|query| query.split('&').any(is_token_pair))
    else {
        return;
    };
    let kept: Vec<&str> = query.split('&').filter(|pair| !is_token_pair(pair)).collect();
    let path = parts.uri.path();
    let rest = if kept.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", kept.join("&"))
    };
    let Ok(rest) = PathAndQuery::try_from(rest) else {
        return;
    };
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.path_and_query = Some(rest);
    // Only path and query changed, and both are parts of what was parsed before.
    parts.uri = http::Uri::from_parts(uri).unwrap_or_default();
}

fn cookies(headers: &HeaderMap) -> Vec<(String, String)> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(';'))
        .filter_map(|pair| pair.trim().strip_prefix(COOKIE_PREFIX)?.split_once('='))
        .map(|(scope, value)| (scope.to_owned(), value.to_owned()))
        .collect()
}

fn strip_cookies(headers: &mut HeaderMap) {
    let ours = |value: &HeaderValue| {
        let prefix = COOKIE_PREFIX.as_bytes();
        value
            .as_bytes()
            .windows(prefix.len())
            .any(|window| window == prefix)
    };
    if !headers.get_all(header::COOKIE).iter().any(ours) {
        return;
    }
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers.iter() {
        if name != header::COOKIE || !ours(value) {
            kept.append(name.clone(), value.clone());
            continue;
        }
        let others: Vec<&[u8]> = value
            .as_bytes()
            .split(|byte| *byte == b';')
            .map(<[u8]>::trim_ascii)
            .filter(|pair| !pair.starts_with(COOKIE_PREFIX.as_bytes()) && !pair.is_empty())
            .collect();
        if let Ok(value) = HeaderValue::from_bytes(&others.join(&b"; "[..]))
            && !others.is_empty()
        {
            kept.append(name.clone(), value);
        }
    }
    *headers = kept;
}

/// Removes a field and keeps the order of the others, which `HeaderMap::remove` would not.
fn remove(headers: &mut HeaderMap, name: &HeaderName) {
    if !headers.contains_key(name) {
        return;
    }
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (other, value) in headers.iter().filter(|(other, _)| *other != name) {
        kept.append(other.clone(), value.clone());
    }
    *headers = kept;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::waker::Target;
    use http::Request;

    fn parts(uri: &str, fields: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn admission(took_token: bool) -> Admission {
        Admission {
            took_token,
            ..Admission::open(Target::Service { listen_port: 1 })
        }
    }

    #[test]
    fn the_token_is_found_and_taken_off_wherever_it_stands() {
        for (uri, token, left) in [
            ("/p?edge_token=t", Some("t"), "/p"),
            ("/?a=1&edge_token=t&b=%20", Some("t"), "/?a=1&b=%20"),
            ("/?edge_token=t&edge_token=u", Some("t"), "/"),
            ("/?edge_token", None, "/"),
            (
                "/?my_edge_token=t&edge_tokens=u",
                None,
                "/?my_edge_token=t&edge_tokens=u",
            ),
            ("/p", None, "/p"),
            ("/?", None, "/?"),
        ] {
            let mut parts = parts(uri, &[("x-edge-token", "h"), ("host", "a")]);
            let shown = shown(&parts, false);
            assert_eq!(shown.query_token.as_deref(), token, "{uri}");
            assert_eq!(shown.header_token.as_deref(), Some("h"));
            take_off(&mut parts, &admission(true));
            assert_eq!(parts.uri, left);
            assert!(!parts.headers.contains_key("x-edge-token") && parts.headers.contains_key("host"));
        }
    }

    #[test]
    fn a_service_that_asks_for_no_token_gets_everything_but_our_cookies() {
        let fields = [
            ("cookie", "a=1; torpor_edge_mch_80=secret; b=2"),
            ("authorization", "Bearer x"),
            ("cookie", "torpor_edge_other_81=secret"),
            ("cookie", "c=3"),
        ];
        let mut parts = parts("/?edge_token=t", &fields);
        let shown = shown(&parts, false);
        let pair = |scope: &str| (scope.to_owned(), "secret".to_owned());
        assert_eq!(shown.cookies, [pair("mch_80"), pair("other_81")]);
        take_off(&mut parts, &admission(false));
        assert_eq!(parts.uri, "/?edge_token=t");
        assert_eq!(parts.headers["authorization"], "Bearer x");
        let cookies: Vec<_> = parts.headers.get_all("cookie").iter().collect();
        assert_eq!(cookies, ["a=1; b=2", "c=3"]);
    }
}
