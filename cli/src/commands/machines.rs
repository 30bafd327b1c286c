//! `create`, `ls`, `get`, `pause`, `resume`, `rm`.

use super::{Context, path};
use crate::args::{Create, Resume, Rm, Traffic, map_of};
use crate::output::{self, label, lease_text, size_of_mib, status_text};
use http::Method;
use torpor_api::http::{
    CreateMachine, Machine, MachineList, ResumeFrom, ResumeMachine, ServiceKind, ServiceSpec, WakePolicy,
};

/// The wake switches of a create: all of them unless the user names some that must not wake.
fn wake_policy(no_wake: &[Traffic]) -> Option<WakePolicy> {
    let wakes = |traffic| !no_wake.contains(&traffic);
    (!no_wake.is_empty()).then(|| WakePolicy {
        http: wakes(Traffic::Http),
        ssh: wakes(Traffic::Ssh),
        tcp: wakes(Traffic::Tcp),
        api: wakes(Traffic::Api),
    })
}

fn body_of(create: Create) -> CreateMachine {
    let http = create
        .publish
        .iter()
        .map(|publish| publish.spec(ServiceKind::Http));
    let tcp = create
        .publish_tcp
        .iter()
        .map(|publish| publish.spec(ServiceKind::Tcp));
    let services: Vec<ServiceSpec> = http.chain(tcp).collect();
    CreateMachine {
        name: create.name,
        template: create.template,
        snapshot: create.snapshot,
        vcpus: create.vcpus,
        mem_mib: create.mem,
        disk_mib: create.disk,
        lease: create.lease.map(|length| create.lease_options.policy(length)),
        wake: wake_policy(&create.no_wake),
        activity: None,
        retention_seconds: create.keep.map(|keep| keep.as_secs()),
        services,
        metadata: map_of(&create.metadata),
        env: map_of(&create.env),
        cwd: create.cwd,
    }
}

/// Makes a machine; prints its name or ID, and its URLs.
pub(super) async fn create(context: &Context, create: Create) -> anyhow::Result<u8> {
    let body = body_of(create);
    let spinner = output::spinner("creating");
    let answer = context
        .client
        .call_with(Method::POST, "/v1/machines", &body)
        .await;
    spinner.finish_and_clear();
    let answer = answer?;
    context.show(&answer, || {
        let machine: Machine = context.client.read(&answer)?;
        let urls = machine
            .services
            .iter()
            .map(|service| format!("{}\n", service.url));
        Ok(format!("{}\n{}", label(&machine), urls.collect::<String>()))
    })?;
    Ok(0)
}

/// Prints all machines, page by page for people and as one list in JSON.
pub(super) async fn list(context: &Context) -> anyhow::Result<u8> {
    let first = context.client.call(Method::GET, "/v1/machines").await?;
    let mut list: MachineList = context.client.read(&first)?;
    if list.next.is_none() {
        context.show(&first, || Ok(machine_table(&list.machines)))?;
        return Ok(0);
    }
    while let Some(after) = list.next.take() {
        let page = context
            .client
            .call(Method::GET, &format!("/v1/machines?after={after}"))
            .await?;
        let page: MachineList = context.client.read(&page)?;
        list.machines.extend(page.machines);
        list.next = page.next;
    }
    let whole = serde_json::to_vec(&list)?.into();
    context.show(&whole, || Ok(machine_table(&list.machines)))?;
    Ok(0)
}

fn machine_table(machines: &[Machine]) -> String {
    let row = |machine: &Machine| {
        let urls: Vec<&str> = machine
            .services
            .iter()
            .map(|service| service.url.as_str())
            .collect();
        vec![
            machine
                .name
                .as_ref()
                .map_or_else(|| "-".to_owned(), ToString::to_string),
            status_text(machine.status).to_owned(),
            machine.id.to_string(),
            format!("{} x {}", machine.vcpus, size_of_mib(machine.mem_mib)),
            lease_text(machine.lease.as_ref()),
            urls.join(" "),
        ]
    };
    let rows: Vec<Vec<String>> = machines.iter().map(row).collect();
    output::table(&["NAME", "STATUS", "ID", "SIZE", "LEASE", "URLS"], &rows)
}

/// Prints one machine.
pub(super) async fn get(context: &Context, name: &str) -> anyhow::Result<u8> {
    let answer = context.client.call(Method::GET, &path(name)).await?;
    context.show(&answer, || Ok(machine_fields(&context.client.read(&answer)?)))?;
    Ok(0)
}

fn machine_fields(machine: &Machine) -> String {
    let wake = super::policy::wake_text(machine.wake);
    let mut rows = vec![
        (
            "name",
            machine
                .name
                .as_ref()
                .map_or_else(|| "-".to_owned(), ToString::to_string),
        ),
        ("id", machine.id.to_string()),
        ("status", status_text(machine.status).to_owned()),
        (
            "execution",
            machine
                .execution_id
                .as_ref()
                .map_or_else(|| "-".to_owned(), ToString::to_string),
        ),
        ("template", machine.template.clone()),
        (
            "size",
            format!(
                "{} vCPU, {} memory, {} disk",
                machine.vcpus,
                size_of_mib(machine.mem_mib),
                size_of_mib(machine.disk_mib)
            ),
        ),
        ("created", output::utc(machine.created_unix_ms)),
        ("lease", lease_text(machine.lease.as_ref())),
        ("kept", super::policy::retention_text(machine.retention)),
        ("wake", wake),
        (
            "cycles",
            format!("{} pauses, {} wakes", machine.pauses, machine.wakes),
        ),
    ];
    for service in &machine.services {
        rows.push((
            "service",
            format!("{} (port {}) {}", service.name, service.port, service.url),
        ));
    }
    for (key, value) in &machine.metadata {
        rows.push(("meta", format!("{key}={value}")));
    }
    if let Some(error) = &machine.last_error {
        let at = output::utc(error.at_unix_ms);
        rows.push((
            "last error",
            format!("{} ({}) at {at}", error.message, error.code.as_str()),
        ));
    }
    output::fields(&rows)
}

/// Puts a machine to sleep and waits until it is durable.
pub(super) async fn pause(context: &Context, name: &str) -> anyhow::Result<u8> {
    let spinner = output::spinner("pausing");
    let answer = context
        .client
        .call(Method::POST, &format!("{}/pause", path(name)))
        .await;
    spinner.finish_and_clear();
    let answer = answer?;
    context.show(&answer, || Ok(status_line(&context.client.read(&answer)?)))?;
    Ok(0)
}

/// Wakes or boots a machine.
pub(super) async fn resume(context: &Context, resume: &Resume) -> anyhow::Result<u8> {
    let from = if resume.from_disk {
        ResumeFrom::Disk
    } else {
        ResumeFrom::Memory
    };
    let spinner = output::spinner(if resume.from_disk { "booting" } else { "resuming" });
    let path = format!("{}/resume", path(&resume.machine));
    let answer = context
        .client
        .call_with(Method::POST, &path, &ResumeMachine { from })
        .await;
    spinner.finish_and_clear();
    let answer = answer?;
    context.show(&answer, || Ok(status_line(&context.client.read(&answer)?)))?;
    Ok(0)
}

fn status_line(machine: &Machine) -> String {
    format!("{} {}\n", label(machine), status_text(machine.status))
}

/// Deletes machines one after the other; the first failure ends it, unless it is one that `-f` forgives.
pub(super) async fn remove(context: &Context, rm: &Rm) -> anyhow::Result<u8> {
    for name in &rm.machines {
        match context.client.call(Method::DELETE, &path(name)).await {
            Ok(answer) if answer.is_empty() => {
                context.show(&"{}".into(), || Ok(format!("{name} deleted\n")))?
            }
            Ok(answer) => context.show(&answer, || Ok(format!("{name} deleted\n")))?,
            Err(error) if rm.force && error.is_machine_not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_wake_turns_off_what_it_names_and_nothing_else() {
        assert_eq!(wake_policy(&[]), None);
        let policy = wake_policy(&[Traffic::Http, Traffic::Tcp]).unwrap();
        assert_eq!(
            policy,
            WakePolicy {
                http: false,
                ssh: true,
                tcp: false,
                api: true
            }
        );
    }
}
