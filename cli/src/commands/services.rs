//! `url`, `expose`, `hide`: the ports of a machine that clients reach.

use super::{Context, path};
use crate::args::{Expose, Format, Hide, Url};
use crate::client::segment;
use crate::output;
use anyhow::bail;
use http::Method;
use torpor_api::http::{Machine, Service, ServiceKind, ServiceSpec};

/// Prints the URL of the one service meant, or of each with its name.
pub(super) async fn url(context: &Context, asked: &Url) -> anyhow::Result<u8> {
    let machine = context.machine(&asked.machine).await?;
    let services: Vec<&Service> = match &asked.service {
        None => machine.services.iter().collect(),
        Some(wanted) => vec![find(&machine, wanted)?],
    };
    match (context.format, services.as_slice()) {
        (Format::Json, services) => output::print_json(&serde_json::to_vec(services)?)?,
        (Format::Table, []) => bail!(
            "{} exposes nothing\n  what to do: Expose a port with 'torpor expose {} PORT'.",
            asked.machine,
            asked.machine
        ),
        (Format::Table, [one]) => output::print_line(&one.url)?,
        (Format::Table, several) => {
            let rows: Vec<Vec<String>> = several
                .iter()
                .map(|service| {
                    vec![
                        service.name.clone(),
                        service.port.to_string(),
                        service.url.clone(),
                    ]
                })
                .collect();
            output::print(output::table(&["NAME", "PORT", "URL"], &rows).as_bytes())?;
        }
    }
    Ok(0)
}

fn find<'a>(machine: &'a Machine, wanted: &str) -> anyhow::Result<&'a Service> {
    let by_name = machine.services.iter().find(|service| service.name == wanted);
    let by_port = || {
        machine
            .services
            .iter()
            .find(|service| service.port.to_string() == wanted)
    };
    let found = by_name.or_else(by_port);
    let Some(found) = found else {
        let label = output::label(machine);
        bail!(
            "{label} has no service {wanted:?}\n  what to do: List its services with 'torpor url {label}'."
        );
    };
    Ok(found)
}

/// Exposes a port and prints its URL.
pub(super) async fn expose(context: &Context, asked: Expose) -> anyhow::Result<u8> {
    let kind = if asked.tcp {
        ServiceKind::Tcp
    } else {
        ServiceKind::Http
    };
    let spec = ServiceSpec {
        name: asked.name,
        port: asked.port,
        kind,
        auth: asked.auth.into(),
        wake_deadline_ms: asked
            .wake_deadline
            .map(|wait| wait.as_secs().saturating_mul(1000)),
    };
    let path = format!("{}/services", path(&asked.machine));
    let answer = context.client.call_with(Method::POST, &path, &spec).await?;
    match context.format {
        Format::Json => output::print_json(&answer)?,
        Format::Table => {
            let machine = context.machine(&asked.machine).await?;
            let service = machine.services.iter().find(|service| service.port == asked.port);
            output::print_line(service.map_or("", |service| &service.url))?;
        }
    }
    Ok(0)
}

/// Takes a service away by its port, which a name is looked up for.
pub(super) async fn hide(context: &Context, asked: &Hide) -> anyhow::Result<u8> {
    let machine = context.machine(&asked.machine).await?;
    let service = find(&machine, &asked.service)?;
    let path = format!("{}/services/{}", path(&asked.machine), segment(&service.name));
    let answer = context.client.call(Method::DELETE, &path).await?;
    let answer = if answer.is_empty() { "{}".into() } else { answer };
    context.show(&answer, || Ok(format!("{} hidden\n", service.name)))?;
    Ok(0)
}
