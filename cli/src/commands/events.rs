//! `events`: what happened, read page by page, and on as more happens.

use super::{Context, path};
use crate::args::{Events, Format};
use crate::output;
use http::Method;
use torpor_api::http::{Event, EventList};

/// Events asked for at a time.
const PAGE: usize = 500;

/// Prints events from an offset to the end, and with `--follow` on from there.
pub(super) async fn run(context: &Context, asked: &Events) -> anyhow::Result<u8> {
    let base = match &asked.machine {
        Some(machine) => format!("{}/events", path(machine)),
        None => "/v1/events".to_owned(),
    };
    let mut after = asked.after;
    loop {
        let answer = context
            .client
            .call(Method::GET, &format!("{base}?after={after}&limit={PAGE}"))
            .await?;
        let list: EventList = context.client.read(&answer)?;
        print(context.format, &list.events)?;
        // An offset that stands still would ask the same question for ever.
        let is_last = list.events.is_empty() || list.next_offset <= after;
        after = after.max(list.next_offset);
        if is_last && !asked.follow {
            return Ok(0);
        }
        if is_last {
            return follow(context, &base, after).await;
        }
    }
}

/// Prints events as they happen, for as long as torpord tells of them.
async fn follow(context: &Context, base: &str, after: u64) -> anyhow::Result<u8> {
    let route = format!("{base}/stream?after={after}");
    let mut stream = context.client.open(Method::GET, &route).await?;
    let mut text = Vec::new();
    while let Some(bytes) = stream.next().await? {
        text.extend_from_slice(&bytes);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            if let Some(data) = line.strip_prefix(b"data: ") {
                print(context.format, &[serde_json::from_slice(data)?])?;
            }
        }
    }
    Ok(0)
}

fn print(format: Format, events: &[Event]) -> anyhow::Result<()> {
    let mut text = String::new();
    for event in events {
        match format {
            Format::Json => text.push_str(&serde_json::to_string(event)?),
            Format::Table => text.push_str(&line(event)),
        }
        text.push('\n');
    }
    output::print(text.as_bytes())
}

fn line(event: &Event) -> String {
    let at = output::utc(event.at_unix_ms);
    let detail = match &event.detail {
        serde_json::Value::Null => String::new(),
        detail => detail.to_string(),
    };
    let line = format!(
        "{:>6}  {at}  {}  {:<18} {:<8} {detail}",
        event.offset, event.machine_id, event.kind, event.actor
    );
    line.trim_end().to_owned()
}
