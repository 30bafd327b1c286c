//! `logs`, `templates`, `status`.

use super::{Context, path};
use crate::args::Logs;
use crate::output::{self, size_of_mib};
use http::Method;
use torpor_api::http::{BlankVmms, Health, SleeperCounts, Slots, TemplateList};

/// Prints the serial console as it is, in either format.
pub(super) async fn logs(context: &Context, asked: &Logs) -> anyhow::Result<u8> {
    let query = asked
        .bytes
        .map_or_else(String::new, |bytes| format!("?bytes={bytes}"));
    let text = context
        .client
        .call(Method::GET, &format!("{}/logs{query}", path(&asked.machine)))
        .await?;
    output::print(&text)?;
    Ok(0)
}

/// Lists the templates.
pub(super) async fn templates(context: &Context) -> anyhow::Result<u8> {
    let answer = context.client.call(Method::GET, "/v1/templates").await?;
    context.show(&answer, || {
        let list: TemplateList = context.client.read(&answer)?;
        let rows: Vec<Vec<String>> = list
            .templates
            .into_iter()
            .map(|template| {
                vec![
                    template.name,
                    size_of_mib(template.disk_mib),
                    template.description,
                ]
            })
            .collect();
        Ok(output::table(&["NAME", "DISK", "DESCRIPTION"], &rows))
    })?;
    Ok(0)
}

/// Prints torpord's version, how many machines are in which state, and what is kept ready.
pub(super) async fn status(context: &Context) -> anyhow::Result<u8> {
    let answer = context.client.call(Method::GET, "/v1/healthz").await?;
    context.show(&answer, || {
        let health: Health = context.client.read(&answer)?;
        let counts: Vec<String> = health
            .machines
            .iter()
            .map(|(status, count)| format!("{count} {status}"))
            .collect();
        let machines = if counts.is_empty() {
            "none".to_owned()
        } else {
            counts.join(", ")
        };
        let rows = [
            ("torpord", health.status),
            ("version", health.version),
            ("machines", machines),
            ("blank VMMs", blank_vmms(&health.pools.blank_vmms)),
            ("network slots", slots(&health.pools.slots)),
            ("asleep with a VMM", sleepers(&health.pools.sleepers)),
        ];
        Ok(output::fields(&rows))
    })?;
    Ok(0)
}

fn blank_vmms(shapes: &[BlankVmms]) -> String {
    if shapes.is_empty() {
        return "none: no machine was started yet".to_owned();
    }
    let shapes = shapes.iter().map(|shape| {
        let BlankVmms {
            vcpus,
            mem_mib,
            ready,
            wanted,
        } = shape;
        format!("{ready} of {wanted} for {vcpus} × {}", size_of_mib(*mem_mib))
    });
    shapes.collect::<Vec<_>>().join(", ")
}

fn slots(slots: &Slots) -> String {
    let Slots {
        ready,
        wanted,
        parked,
        free,
        most,
    } = slots;
    format!("{ready} of {wanted} ready, {parked} parked, {free} of {most} free")
}

fn sleepers(counts: &SleeperCounts) -> String {
    let SleeperCounts {
        resident,
        resident_mem_mib,
        dozing,
    } = counts;
    format!("{resident} resident ({resident_mem_mib} MiB), {dozing} dozing")
}
