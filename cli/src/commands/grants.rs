//! `grant`: signed URLs of services.

use super::{Context, path};
use crate::args::Grants;
use crate::client::segment;
use crate::output;
use http::Method;
use torpor_api::http::{CreateGrant, Grant, GrantList, GrantStatus, GrantTransport, IssuedGrant};

/// Makes, lists and takes back signed URLs.
pub(super) async fn run(context: &Context, command: Grants) -> anyhow::Result<u8> {
    let route =
        |machine: &str, service: &str| format!("{}/services/{}/grants", path(machine), segment(service));
    match command {
        Grants::Create {
            machine,
            service,
            expires,
            transport,
        } => {
            let body = CreateGrant {
                expires_in_seconds: expires.map(|expires| expires.as_secs()),
                transport: transport.into(),
            };
            let answer = context
                .client
                .call_with(Method::POST, &route(&machine, &service), &body)
                .await?;
            context.show(&answer, || {
                let issued: IssuedGrant = context.client.read(&answer)?;
                let url = issued.url.or(issued.websocket_url);
                Ok(format!("{}\n", url.unwrap_or(issued.token)))
            })?;
        }
        Grants::Ls { machine, service } => {
            let answer = context
                .client
                .call(Method::GET, &route(&machine, &service))
                .await?;
            context.show(&answer, || {
                let list: GrantList = context.client.read(&answer)?;
                let rows: Vec<Vec<String>> = list.grants.iter().map(row).collect();
                Ok(output::table(
                    &["ID", "STATUS", "FOR", "EXPIRES", "REQUESTS", "WEBSOCKETS"],
                    &rows,
                ))
            })?;
        }
        Grants::Revoke {
            machine,
            service,
            grants,
        } => {
            for grant in grants {
                let route = format!("{}/{}", route(&machine, &service), segment(&grant));
                let answer = context.client.call(Method::DELETE, &route).await?;
                context.show(&answer, || Ok(format!("{grant} revoked\n")))?;
            }
        }
    }
    Ok(0)
}

fn row(grant: &Grant) -> Vec<String> {
    let status = match grant.status {
        GrantStatus::Active => "active",
        GrantStatus::Expired => "expired",
        GrantStatus::Revoked => "revoked",
    };
    let transport = match grant.transport {
        GrantTransport::Any => "any",
        GrantTransport::Http => "http",
        GrantTransport::Websocket => "websocket",
    };
    vec![
        grant.id.to_string(),
        status.to_owned(),
        transport.to_owned(),
        output::utc(grant.expires_unix_ms),
        grant.http_request_count.to_string(),
        grant.websocket_connection_count.to_string(),
    ]
}
