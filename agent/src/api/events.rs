//! `/v1/events` and `/v1/machines/{id}/events`: what happened.

use super::error::Failure;
use super::extract::{Named, Query};
use crate::machine::fleet::Fleet;
use crate::store::EventFilter;
use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use torpor_api::MachineId;
use torpor_api::http::EventList;

const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    #[serde(default)]
    after: u64,
    limit: Option<u32>,
}

pub(super) async fn of_machine(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(page): Query<Page>,
) -> Result<Json<EventList>, Failure> {
    read(&fleet, Some(id), &page).await
}

pub(super) async fn of_host(
    State(fleet): State<Fleet>,
    Query(page): Query<Page>,
) -> Result<Json<EventList>, Failure> {
    read(&fleet, None, &page).await
}

async fn read(fleet: &Fleet, machine: Option<MachineId>, page: &Page) -> Result<Json<EventList>, Failure> {
    let limit = page.limit.unwrap_or(DEFAULT_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Failure::invalid(format!(
            "limit is {limit}, and has to be 1 to {MAX_PAGE}"
        )));
    }
    let events = fleet
        .store()
        .events(EventFilter {
            machine,
            after: page.after,
            limit,
        })
        .await?;
    let next_offset = events.last().map_or(page.after, |event| event.offset);
    Ok(Json(EventList { events, next_offset }))
}
