//! `events`: what happened, read page by page, and on as more happens.

use super::{Context, path};
use crate::args::{Events, Format};
use crate::output;
use http::Method;
use std::time::Duration;
use torpor_api::http::{Event, EventList};

/// Events asked for at a time.
const PAGE: usize = 500;
/// Pause between two questions of `--follow`; the API does not hold a question until something happens.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

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
            tokio::time::sleep(FOLLOW_INTERVAL).await;
        }
    }
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
