//! `lease`, `activity`, `keep` and `wake`: when a machine falls asleep, what keeps it from that, how long it is kept
//! then, and what wakes it.

use super::{Context, path};
use crate::args::{self, Switch};
use crate::output::{lease_text, short_duration};
use anyhow::Context as _;
use http::Method;
use std::path::Path;
use std::time::Duration;
use torpor_api::activity::{ActivityPolicy, PatchActivity};
use torpor_api::http::{MachineRetention, PatchWake, SetLease, SetRetention, WakeFilter, WakePolicy};

/// Shows, sets or takes away the lease.
pub(super) async fn lease(context: &Context, asked: &args::Lease) -> anyhow::Result<u8> {
    let policy = asked.lease.map(|length| asked.options.policy(length));
    let answer = if policy.is_none() && !asked.none {
        let machine = context.machine(&asked.machine).await?;
        serde_json::to_vec(&machine.lease)?.into()
    } else {
        let path = format!("{}/lease", path(&asked.machine));
        context
            .client
            .call_with(Method::PUT, &path, &SetLease { lease: policy })
            .await?
    };
    match context.format {
        args::Format::Json => crate::output::print_json(&answer)?,
        args::Format::Table => {
            let machine = context.machine(&asked.machine).await?;
            crate::output::print_line(&lease_text(machine.lease.as_ref()))?;
        }
    }
    Ok(0)
}

/// Shows or changes what counts as use of a machine.
pub(super) async fn activity(context: &Context, asked: &args::Activity) -> anyhow::Result<u8> {
    let patch = PatchActivity {
        proxy: on(asked.proxy),
        sessions: on(asked.sessions),
        outbound: on(asked.outbound),
        cpu: on(asked.cpu),
        hold: on(asked.hold),
        cpu_floor_percent: asked.cpu_floor,
        min_awake_seconds: asked.min_awake.map(|least| least.as_secs()),
    };
    let path = format!("{}/activity", path(&asked.machine));
    let answer = if patch == PatchActivity::default() {
        context.client.call(Method::GET, &path).await?
    } else {
        context.client.call_with(Method::PATCH, &path, &patch).await?
    };
    context.show(&answer, || {
        let policy: ActivityPolicy = context.client.read(&answer)?;
        Ok(activity_text(&policy))
    })?;
    Ok(0)
}

fn activity_text(policy: &ActivityPolicy) -> String {
    let sources = [
        ("proxy", policy.proxy),
        ("sessions", policy.sessions),
        ("outbound", policy.outbound),
        ("cpu", policy.cpu),
        ("hold", policy.hold),
    ];
    let counted = sources.iter().filter(|(_, on)| *on).map(|(name, _)| *name);
    let counted = counted.collect::<Vec<_>>().join(", ");
    let least = match policy.min_awake_seconds {
        0 => "none".to_owned(),
        seconds => short_duration(Duration::from_secs(seconds)),
    };
    crate::output::fields(&[
        (
            "counts",
            if counted.is_empty() {
                "nothing".to_owned()
            } else {
                counted
            },
        ),
        (
            "busy above",
            format!("{} % of one processor", policy.cpu_floor_percent),
        ),
        ("min awake", least),
    ])
}

fn on(switch: Option<Switch>) -> Option<bool> {
    switch.map(|switch| switch == Switch::On)
}

/// Shows, sets or takes away how long a machine is kept that is not awake.
pub(super) async fn keep(context: &Context, asked: &args::Keep) -> anyhow::Result<u8> {
    let path = format!("{}/retention", path(&asked.machine));
    let answer = if asked.keep.is_none() && !asked.forever {
        context.client.call(Method::GET, &path).await?
    } else {
        let body = SetRetention {
            retention_seconds: asked.keep.map(|keep| keep.as_secs()),
        };
        context.client.call_with(Method::PUT, &path, &body).await?
    };
    context.show(&answer, || {
        let retention: Option<MachineRetention> = context.client.read(&answer)?;
        Ok(format!("{}\n", retention_text(retention)))
    })?;
    Ok(0)
}

/// How long a machine is kept, in words.
pub(super) fn retention_text(retention: Option<MachineRetention>) -> String {
    let Some(retention) = retention else {
        return "until it is deleted".to_owned();
    };
    let length = short_duration(Duration::from_secs(retention.seconds));
    match retention.remaining_ms {
        Some(ms) => format!("{} of {length} left", short_duration(Duration::from_millis(ms))),
        None => format!("{length} after it was last awake"),
    }
}

/// Shows or changes the wake switches.
pub(super) async fn wake(context: &Context, asked: &args::Wake) -> anyhow::Result<u8> {
    if let Some(file) = &asked.filter {
        return filter(context, &asked.machine, file).await;
    }
    let patch = PatchWake {
        http: on(asked.http),
        ssh: on(asked.ssh),
        tcp: on(asked.tcp),
        api: on(asked.api),
    };
    let answer = if patch == PatchWake::default() {
        let machine = context.machine(&asked.machine).await?;
        serde_json::to_vec(&machine.wake)?.into()
    } else {
        let path = format!("{}/wake", path(&asked.machine));
        context.client.call_with(Method::PATCH, &path, &patch).await?
    };
    match context.format {
        args::Format::Json => crate::output::print_json(&answer)?,
        args::Format::Table => {
            let machine = context.machine(&asked.machine).await?;
            crate::output::print_line(&wake_text(machine.wake))?;
        }
    }
    Ok(0)
}

/// Sets which requests never wake a machine.
async fn filter(context: &Context, machine: &str, file: &Path) -> anyhow::Result<u8> {
    let text = if file == Path::new("-") {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(file)
    };
    let text = text.with_context(|| format!("cannot read {}", file.display()))?;
    let rules: WakeFilter =
        serde_json::from_str(&text).with_context(|| format!("{} is no wake filter", file.display()))?;
    let path = format!("{}/wake/filter", path(machine));
    let answer = context.client.call_with(Method::PUT, &path, &rules).await?;
    context.show(&answer, || Ok(format!("{} rules\n", rules.rules.len())))?;
    Ok(0)
}

/// What wakes a machine, in words.
pub(super) fn wake_text(wake: WakePolicy) -> String {
    let switches = [
        ("http", wake.http),
        ("ssh", wake.ssh),
        ("tcp", wake.tcp),
        ("api", wake.api),
    ];
    let on: Vec<&str> = switches
        .iter()
        .filter(|(_, on)| *on)
        .map(|(name, _)| *name)
        .collect();
    if on.is_empty() {
        "only 'torpor resume'".to_owned()
    } else {
        on.join(", ")
    }
}
