//! `template ls|import|rm`.

use super::{Context, host};
use crate::args::{Import, Templates, map_of};
use crate::output;
use crate::template::{self, Import as Order};
use anyhow::{Context as _, bail};
use http::Method;
use std::path::Path;
use torpor_api::MachineName;
use torpor_api::http::{MachineList, SnapshotList};

pub(super) async fn run(context: &Context, command: Templates) -> anyhow::Result<u8> {
    match command {
        Templates::Ls => host::templates(context).await,
        Templates::Import(import) => make(import),
        Templates::Rm { names, templates_dir } => {
            for name in &names {
                remove(context, name, &templates_dir).await?;
            }
            Ok(0)
        }
    }
}

/// Imports a template; prints its name.
fn make(import: Import) -> anyhow::Result<u8> {
    let shell = |line: String| match line.as_str() {
        "" => Vec::new(),
        _ => vec!["/bin/sh".to_owned(), "-c".to_owned(), line],
    };
    let order = Order {
        source: import.source,
        size_mib: import.size,
        env: map_of(&import.env),
        workdir: import.workdir,
        entrypoint: import.entrypoint.map(shell),
        description: import.description,
        templates_dir: import.templates_dir,
        base_dir: import.base,
        name: import.name,
    };
    template::import(&order).with_context(|| format!("no template {} was made", order.name))?;
    output::print_line(order.name.as_str())?;
    Ok(0)
}

/// Deletes a template, unless something needs its disk.
async fn remove(context: &Context, name: &MachineName, templates_dir: &Path) -> anyhow::Result<()> {
    let machines = context
        .client
        .call(Method::GET, &format!("/v1/machines?template={name}&limit=1"))
        .await?;
    let machines: MachineList = context.client.read(&machines)?;
    if let Some(machine) = machines.machines.first() {
        bail!(
            "machine {} is made from template {name}; delete it first",
            machine.id
        );
    }
    let mut at = "/v1/snapshots".to_owned();
    loop {
        let page = context.client.call(Method::GET, &at).await?;
        let page: SnapshotList = context.client.read(&page)?;
        let needs = page
            .snapshots
            .iter()
            .find(|snapshot| snapshot.template == name.as_str());
        if let Some(snapshot) = needs {
            bail!("snapshot {} is of template {name}; delete it first", snapshot.id);
        }
        let Some(after) = page.next else { break };
        at = format!("/v1/snapshots?after={after}");
    }
    let (place, doomed) = (
        templates_dir.join(name.as_str()),
        templates_dir.join(format!(".removed-{name}")),
    );
    // Its name goes first: half a template is none.
    std::fs::rename(&place, &doomed).with_context(|| format!("cannot remove {}", place.display()))?;
    std::fs::remove_dir_all(&doomed).with_context(|| format!("cannot remove {}", doomed.display()))?;
    output::print_line(name.as_str())
}
