//! The events table: what happened to machines, in one sequence per host, kept after a machine is gone.

use super::rows::{get, parse, parse_optional};
use super::{Store, StoreError, sql};
use rusqlite::{Connection, params};
use torpor_api::http::Event;
use torpor_api::{ExecutionId, MachineId};

/// Rows past this many are dropped, oldest first.
const KEPT_EVENTS: u64 = 1_000_000;
/// Dropping is done once in so many rows.
const TRIM_EVERY: i64 = 1024;

/// An event that is about to be stored.
#[derive(Debug, Clone, PartialEq)]
pub struct NewEvent {
    /// Unix time in milliseconds.
    pub at_unix_ms: u64,
    /// The machine.
    pub machine: MachineId,
    /// The execution, where one was live.
    pub execution: Option<ExecutionId>,
    /// What happened.
    pub kind: &'static str,
    /// Who caused it.
    pub actor: &'static str,
    /// Details by kind.
    pub detail: serde_json::Value,
}

/// Which events are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventFilter {
    /// Of this machine only.
    pub machine: Option<MachineId>,
    /// With a larger offset than this.
    pub after: u64,
    /// At most so many.
    pub limit: u32,
}

pub(super) fn insert(connection: &Connection, event: &NewEvent) -> Result<(), StoreError> {
    let operation = sql("append an event");
    connection
        .prepare_cached(
            "INSERT INTO events (at_unix_ms, machine_id, execution_id, kind, actor, detail) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )
        .and_then(|mut statement| {
            statement.execute(params![
                event.at_unix_ms,
                event.machine.as_str(),
                event.execution.as_ref().map(ExecutionId::as_str),
                event.kind,
                event.actor,
                event.detail.to_string(),
            ])
        })
        .map_err(&operation)?;
    let offset = connection.last_insert_rowid();
    if offset % TRIM_EVERY == 0 {
        connection
            .execute(
                "DELETE FROM events WHERE offset <= ?1 - ?2",
                params![offset, KEPT_EVENTS],
            )
            .map_err(&operation)?;
    }
    Ok(())
}

impl Store {
    /// The last events of a machine, newest first.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn last_events(&self, machine: MachineId, limit: u32) -> Result<Vec<Event>, StoreError> {
        self.read("read the last events", move |tx| {
            let operation = sql("read the last events");
            let text = "SELECT * FROM events WHERE machine_id = ?1 ORDER BY offset DESC LIMIT ?2";
            let mut statement = tx.prepare_cached(text).map_err(&operation)?;
            let mut rows = statement
                .query(params![machine.as_str(), limit])
                .map_err(&operation)?;
            let mut events = Vec::new();
            while let Some(row) = rows.next().map_err(&operation)? {
                events.push(decode(row)?);
            }
            Ok(events)
        })
        .await
    }

    /// The machine that an execution belonged to, as events tell, which outlive it.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn machine_of_events(&self, execution: ExecutionId) -> Result<Option<MachineId>, StoreError> {
        self.read("find the events of an execution", move |tx| {
            let operation = sql("find the events of an execution");
            // Newest first: whoever asks knows a machine of lately.
            let text = "SELECT machine_id FROM events WHERE execution_id = ?1 ORDER BY offset DESC LIMIT 1";
            let mut statement = tx.prepare_cached(text).map_err(&operation)?;
            let mut rows = statement.query([execution.as_str()]).map_err(&operation)?;
            let row = rows.next().map_err(&operation)?;
            row.map(|row| parse(&get::<String>(row, "machine_id")?, "machine_id"))
                .transpose()
        })
        .await
    }

    /// Append one event.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn append_event(&self, event: NewEvent) -> Result<(), StoreError> {
        self.write("append an event", move |tx| insert(tx, &event)).await
    }

    /// The newest events, of one machine if given, in order.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn latest_events(
        &self,
        machine: Option<MachineId>,
        limit: u32,
    ) -> Result<Vec<Event>, StoreError> {
        self.read("read the newest events", move |tx| {
            let operation = sql("read the newest events");
            let text = match &machine {
                Some(_) => "SELECT * FROM events WHERE machine_id = ?2 ORDER BY offset DESC LIMIT ?1",
                None => "SELECT * FROM events WHERE ?2 IS NULL ORDER BY offset DESC LIMIT ?1",
            };
            let mut statement = tx.prepare_cached(text).map_err(&operation)?;
            let machine = machine.as_ref().map(MachineId::as_str);
            let mut rows = statement.query(params![limit, machine]).map_err(&operation)?;
            let mut events = Vec::new();
            while let Some(row) = rows.next().map_err(&operation)? {
                events.push(decode(row)?);
            }
            events.reverse();
            Ok(events)
        })
        .await
    }

    /// Events in order.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn events(&self, filter: EventFilter) -> Result<Vec<Event>, StoreError> {
        self.read("read events", move |tx| {
            let operation = sql("read events");
            let text = match &filter.machine {
                Some(_) => {
                    "SELECT * FROM events WHERE offset > ?1 AND machine_id = ?3 ORDER BY offset LIMIT ?2"
                }
                None => "SELECT * FROM events WHERE offset > ?1 AND ?3 IS NULL ORDER BY offset LIMIT ?2",
            };
            let mut statement = tx.prepare_cached(text).map_err(&operation)?;
            // An offset past SQLite's integers is past every row.
            let after = i64::try_from(filter.after).unwrap_or(i64::MAX);
            let machine = filter.machine.as_ref().map(MachineId::as_str);
            let mut rows = statement
                .query(params![after, filter.limit, machine])
                .map_err(&operation)?;
            let mut events = Vec::new();
            while let Some(row) = rows.next().map_err(&operation)? {
                events.push(decode(row)?);
            }
            Ok(events)
        })
        .await
    }
}

fn decode(row: &rusqlite::Row<'_>) -> Result<Event, StoreError> {
    let detail: String = get(row, "detail")?;
    Ok(Event {
        offset: get(row, "offset")?,
        at_unix_ms: get(row, "at_unix_ms")?,
        machine_id: parse(&get::<String>(row, "machine_id")?, "machine_id")?,
        execution_id: parse_optional(get(row, "execution_id")?, "execution_id")?,
        kind: get(row, "kind")?,
        actor: get(row, "actor")?,
        detail: serde_json::from_str(&detail).map_err(|_| StoreError::BadRow {
            table: "events",
            column: "detail",
            value: detail.chars().take(64).collect(),
        })?,
    })
}
