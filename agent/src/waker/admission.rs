//! Whether a request may pass, before it can wake anything.

use crate::edge::{Scope, Use};
use crate::machine::fleet::Fleet;
use crate::store::ServiceRoute;
use torpor_api::ErrorCode;
use torpor_api::http::ServiceAuth;
use torpor_proxy::{Admission, EdgeCookie, Shown, Target, WakeRefusal};

/// Leave to reach `route`, by what the request shows.
pub(super) async fn admit(
    fleet: &Fleet,
    route: &ServiceRoute,
    shown: &Shown,
) -> Result<Admission, WakeRefusal> {
    let open = Admission::open(Target::Service {
        listen_port: route.listen_port,
    });
    match route.auth {
        ServiceAuth::None => Ok(open),
        ServiceAuth::ApiKey => {
            let sent = shown
                .authorization
                .as_deref()
                .and_then(|sent| sent.strip_prefix("Bearer "));
            if sent.is_some_and(|sent| fleet.edge().is_api_token(sent.as_bytes())) {
                return Ok(Admission {
                    took_authorization: true,
                    ..open
                });
            }
            let message = "this service wants the API's bearer token, and no valid one was sent";
            Err(WakeRefusal::new(ErrorCode::Unauthorized, message))
        }
        ServiceAuth::Token => by_token(fleet, route, shown, open).await,
    }
}

async fn by_token(
    fleet: &Fleet,
    route: &ServiceRoute,
    shown: &Shown,
    open: Admission,
) -> Result<Admission, WakeRefusal> {
    let scope = format!("{}_{}", route.machine, route.port);
    let explicit = shown.query_token.as_deref().or(shown.header_token.as_deref());
    let cookie = shown
        .cookies
        .iter()
        .find(|(known, _)| *known == scope)
        .map(|(_, value)| value.as_str());
    // Any page may open a WebSocket with the cookies of another: only what a page must know opens one.
    let token = explicit.or(cookie.filter(|_| !shown.upgrade));
    let Some(token) = token else {
        let message = if cookie.is_some() {
            "a cookie opens no WebSocket; show the edge token in the query or a header"
        } else {
            "this service wants an edge token, and none was sent"
        };
        return Err(WakeRefusal::new(ErrorCode::EdgeTokenMissing, message));
    };
    let what = if shown.upgrade { Use::Upgrade } else { Use::Request };
    let now_unix_ms = fleet.now_unix_ms();
    let wanted = Scope {
        machine: &route.machine,
        port: route.port,
        what,
    };
    let edge = fleet.edge();
    let claims = edge
        .take(fleet.store(), token, wanted, now_unix_ms)
        .await
        .map_err(|untaken| WakeRefusal::new(untaken.code, untaken.message))?;
    let from_query = shown.query_token.is_some() && !shown.upgrade && cookie != Some(token);
    Ok(Admission {
        took_token: true,
        cookie: from_query.then(|| EdgeCookie {
            scope,
            value: token.to_owned(),
            max_age_seconds: claims.expires_unix_ms.saturating_sub(now_unix_ms) / 1000,
        }),
        also_count: Some(edge.count(&claims.grant, what, now_unix_ms)),
        ..open
    })
}
