//! `snapshot create|ls|rm` and `fork`.

use super::{Context, path};
use crate::args::{Fork, Snapshots, map_of};
use crate::client::segment;
use crate::output::{self, label};
use http::Method;
use std::time::Duration;
use torpor_api::MachineName;
use torpor_api::http::{CreateSnapshot, ForkMachine, Forked, Snapshot, SnapshotList};

pub(super) async fn run(context: &Context, snapshots: Snapshots) -> anyhow::Result<u8> {
    match snapshots {
        Snapshots::Create {
            machine,
            name,
            digest,
            keep,
            metadata,
        } => {
            let body = CreateSnapshot {
                name,
                digest,
                metadata: map_of(&metadata),
                retention_seconds: keep.map(|keep| keep.as_secs()),
            };
            create(context, &machine, &body).await
        }
        Snapshots::Ls { machine } => list(context, machine.as_deref()).await,
        Snapshots::Rm { snapshots } => remove(context, &snapshots).await,
    }
}

/// Takes a snapshot; prints its name or ID.
async fn create(context: &Context, machine: &str, body: &CreateSnapshot) -> anyhow::Result<u8> {
    let spinner = output::spinner("taking a snapshot");
    let at = format!("{}/snapshots", path(machine));
    let answer = context.client.call_with(Method::POST, &at, body).await;
    spinner.finish_and_clear();
    let answer = answer?;
    context.show(&answer, || {
        let snapshot: Snapshot = context.client.read(&answer)?;
        Ok(format!("{}\n", name_of(&snapshot)))
    })?;
    Ok(0)
}

fn name_of(snapshot: &Snapshot) -> String {
    let name = snapshot.name.as_ref().map(MachineName::to_string);
    name.unwrap_or_else(|| snapshot.id.to_string())
}

/// Prints all snapshots, page by page for people and as one list in JSON.
async fn list(context: &Context, machine: Option<&str>) -> anyhow::Result<u8> {
    let at = machine.map_or("/v1/snapshots".to_owned(), |machine| {
        format!("{}/snapshots", path(machine))
    });
    let first = context.client.call(Method::GET, &at).await?;
    let mut list: SnapshotList = context.client.read(&first)?;
    while let Some(after) = list.next.take() {
        let page = context
            .client
            .call(Method::GET, &format!("{at}?after={after}"))
            .await?;
        let page: SnapshotList = context.client.read(&page)?;
        list.snapshots.extend(page.snapshots);
        list.next = page.next;
    }
    let whole = serde_json::to_vec(&list)?.into();
    context.show(&whole, || Ok(table(&list.snapshots)))?;
    Ok(0)
}

fn table(snapshots: &[Snapshot]) -> String {
    let rows: Vec<Vec<String>> = snapshots
        .iter()
        .map(|snapshot| {
            let keep = snapshot
                .retention
                .map(|keep| output::short_duration(Duration::from_secs(keep.seconds)));
            vec![
                name_of(snapshot),
                snapshot.id.to_string(),
                snapshot.machine_id.to_string(),
                snapshot.template.clone(),
                output::size_of_mib(u32::try_from(snapshot.size_bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX)),
                keep.unwrap_or_else(|| "for ever".to_owned()),
            ]
        })
        .collect();
    output::table(&["NAME", "ID", "MACHINE", "TEMPLATE", "SIZE", "KEPT"], &rows)
}

async fn remove(context: &Context, snapshots: &[String]) -> anyhow::Result<u8> {
    for snapshot in snapshots {
        let at = format!("/v1/snapshots/{}", segment(snapshot));
        context.client.call(Method::DELETE, &at).await?;
        output::print_line(snapshot)?;
    }
    Ok(0)
}

/// Makes forks; prints their IDs.
pub(super) async fn fork(context: &Context, fork: &Fork) -> anyhow::Result<u8> {
    let body = ForkMachine {
        count: fork.count,
        lease: fork.lease.map(|length| fork.lease_options.policy(length)),
        keep_snapshot: fork.keep_snapshot,
        ..ForkMachine::default()
    };
    let spinner = output::spinner("forking");
    let at = format!("{}/fork", path(&fork.machine));
    let answer = context.client.call_with(Method::POST, &at, &body).await;
    spinner.finish_and_clear();
    let answer = answer?;
    context.show(&answer, || {
        let forked: Forked = context.client.read(&answer)?;
        let lines = forked
            .machines
            .iter()
            .map(|machine| format!("{}\n", label(machine)));
        Ok(lines.collect::<String>())
    })?;
    Ok(0)
}
