//! What goes on inside a machine: `ps`, `kill`, and `why` it is awake or asleep.

use super::{Context, path};
use crate::args::Kill;
use crate::output;
use http::Method;
use std::time::Duration;
use torpor_api::http::{KillProcess, ProcessList, Why};

/// Lists the processes that commands started.
pub(super) async fn ps(context: &Context, machine: &str) -> anyhow::Result<u8> {
    let route = format!("{}/processes", path(machine));
    let answer = context.client.call(Method::GET, &route).await?;
    context.show(&answer, || {
        let list: ProcessList = context.client.read(&answer)?;
        let rows: Vec<Vec<String>> = list
            .processes
            .into_iter()
            .map(|process| {
                let state = match process.exit_code {
                    None => "running".to_owned(),
                    Some(_) if process.timed_out => "timed out".to_owned(),
                    Some(code) => format!("exit {code}"),
                };
                let command: String = process.argv.join(" ").chars().take(100).collect();
                vec![
                    process.pid.to_string(),
                    state,
                    output::utc(process.started_unix_ms),
                    command,
                ]
            })
            .collect();
        Ok(output::table(&["PID", "STATE", "STARTED", "COMMAND"], &rows))
    })?;
    Ok(0)
}

/// Signals the whole group of a process.
pub(super) async fn kill(context: &Context, kill: &Kill) -> anyhow::Result<u8> {
    let route = format!("{}/processes/{}/kill", path(&kill.machine), kill.pid);
    let body = KillProcess { signal: kill.signal };
    context.client.call_with(Method::POST, &route, &body).await?;
    Ok(0)
}

/// Says why a machine is awake or asleep.
pub(super) async fn why(context: &Context, machine: &str) -> anyhow::Result<u8> {
    let answer = context
        .client
        .call(Method::GET, &format!("{}/why", path(machine)))
        .await?;
    context.show(&answer, || {
        let why: Why = context.client.read(&answer)?;
        Ok(explained(&why))
    })?;
    Ok(0)
}

fn explained(why: &Why) -> String {
    let status = serde_json::to_value(why.status).unwrap_or_default();
    let mut text = format!("{}: {}\n", status.as_str().unwrap_or_default(), why.because);
    if let Some(event) = &why.event {
        text.push_str(&format!(
            "since {} (event {})\n",
            output::utc(event.at_unix_ms),
            event.offset
        ));
    }
    for sign in &why.activity {
        let ago = output::short_duration(Duration::from_millis(sign.ago_ms));
        let source = serde_json::to_value(sign.source).unwrap_or_default();
        let source = source.as_str().unwrap_or_default();
        let but = if sign.counts { "" } else { ", which does not count" };
        text.push_str(&format!("last {source} activity {ago} ago{but}\n"));
    }
    if let Some(left_ms) = why.min_awake_remaining_ms {
        let left = output::short_duration(Duration::from_millis(left_ms));
        text.push_str(&format!("no lease ends within the next {left}\n"));
    }
    if why.at_work {
        text.push_str("a command runs in it\n");
    }
    if let Some(hold) = &why.hold {
        let left = output::short_duration(Duration::from_millis(hold.remaining_ms));
        text.push_str(&format!("held from inside for {left} more: {}\n", hold.reason));
    }
    if let Some(remaining_ms) = why.lease.as_ref().and_then(|lease| lease.remaining_ms) {
        let left = output::short_duration(Duration::from_millis(remaining_ms));
        text.push_str(&format!("its lease has {left} left\n"));
    }
    text
}
