//! One committed step of a machine's life: row, execution, aliases and event in one transaction.

use super::events::{self, NewEvent};
use super::rows::{self, MachineRow};
use super::{Store, StoreError, sql};
use crate::machine::state::Committed;
use rusqlite::{Connection, params};
use torpor_api::http::LastError;
use torpor_api::{ExecutionId, MachineId};

/// What a transition does to the deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// A whole window from now.
    Restart,
    /// As it was; a whole window if there was no deadline.
    KeepOrStart,
    /// No deadline: time asleep does not count.
    Clear,
}

/// A step from one committed state to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// Generation of the row that this step begins with.
    pub generation: u64,
    /// What the row says afterwards.
    pub to: Committed,
    /// The execution that is live afterwards. It becomes an alias of the machine for ever.
    pub execution: Option<ExecutionId>,
    /// Why the execution that was live before is over.
    pub end_reason: &'static str,
    /// The image's generation, if it changes.
    pub image_generation: Option<u64>,
    /// What becomes of the deadline.
    pub lease: LeaseChange,
    /// Do it only if the deadline is still this one: the lease wanted it, and may have been moved.
    pub only_if_deadline_unix_ms: Option<u64>,
    /// Do it only if its retention has ended by then.
    pub only_if_expired_at_unix_ms: Option<u64>,
    /// A pause was completed.
    pub counts_pause: bool,
    /// A wake was completed.
    pub counts_wake: bool,
    /// What the machine remembers as its last failure.
    pub last_error: Option<LastError>,
    /// Goes to the events table in the same transaction; its time is the transition's.
    pub event: Option<NewEvent>,
    /// Unix time in milliseconds.
    pub at_unix_ms: u64,
    /// Who caused it.
    pub actor: &'static str,
}

impl Transition {
    /// A step that changes the state and nothing else yet.
    #[must_use]
    pub fn new(generation: u64, to: Committed, actor: &'static str, at_unix_ms: u64) -> Self {
        Self {
            generation,
            to,
            execution: None,
            end_reason: to.as_str(),
            image_generation: None,
            lease: LeaseChange::Clear,
            only_if_deadline_unix_ms: None,
            only_if_expired_at_unix_ms: None,
            counts_pause: false,
            counts_wake: false,
            last_error: None,
            event: None,
            at_unix_ms,
            actor,
        }
    }
}

impl Store {
    /// Commit a step; answers the row as it is then.
    ///
    /// # Errors
    /// [`StoreError::Superseded`] and [`StoreError::LeaseMoved`] when it must not happen, or SQLite refuses.
    pub async fn commit(&self, id: MachineId, transition: Transition) -> Result<MachineRow, StoreError> {
        self.write("commit a transition", move |tx| {
            let row = rows::machine(tx, &id)?.ok_or_else(|| StoreError::NoMachine { id: id.to_string() })?;
            if row.generation != transition.generation {
                return Err(StoreError::Superseded {
                    id,
                    generation: transition.generation,
                });
            }
            let expected = transition.only_if_deadline_unix_ms;
            if expected.is_some() && expected != row.deadline_unix_ms {
                return Err(StoreError::LeaseMoved { id });
            }
            let is_due = |now: u64| row.expires_unix_ms.is_some_and(|expires| expires <= now);
            if !transition.only_if_expired_at_unix_ms.is_none_or(is_due) {
                return Err(StoreError::LeaseMoved { id });
            }
            update_row(tx, &row, &transition)?;
            update_executions(tx, &id, &transition)?;
            if let Some(event) = &transition.event {
                events::insert(tx, event)?;
            }
            rows::machine(tx, &id)?.ok_or_else(|| StoreError::NoMachine { id: id.to_string() })
        })
        .await
    }

    /// Remember a failure that changed no state.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn record_failure(
        &self,
        id: MachineId,
        last_error: LastError,
        event: NewEvent,
    ) -> Result<(), StoreError> {
        self.write("record a failure", move |tx| {
            tx.prepare_cached("UPDATE machines SET last_error = ?2 WHERE id = ?1")
                .and_then(|mut statement| statement.execute(params![id.as_str(), error_json(&last_error)]))
                .map_err(sql("record a failure"))?;
            events::insert(tx, &event)
        })
        .await
    }
}

fn error_json(error: &LastError) -> String {
    serde_json::json!({ "code": error.code, "message": error.message, "at_unix_ms": error.at_unix_ms })
        .to_string()
}

fn update_row(connection: &Connection, row: &MachineRow, transition: &Transition) -> Result<(), StoreError> {
    let window_end = row.lease.map(|lease| {
        transition
            .at_unix_ms
            .saturating_add(lease.seconds.saturating_mul(1000))
    });
    // A deadline that stays keeps the time of its next look, too, or a lease that cannot be carried out would be
    // tried without a pause.
    let deadline = match transition.lease {
        LeaseChange::Restart => window_end,
        LeaseChange::KeepOrStart => row.deadline_unix_ms.or(window_end),
        LeaseChange::Clear => None,
    };
    connection
        .prepare_cached(
            "UPDATE machines SET state = ?3, generation = generation + 1, execution_id = ?4, \
             image_generation = coalesce(?5, image_generation), deadline_unix_ms = ?6, \
             lease_check_unix_ms = iif(?6 IS deadline_unix_ms, lease_check_unix_ms, ?6), \
             pauses = pauses + ?7, wakes = wakes + ?8, last_error = ?9, last_used_unix_ms = ?10, \
             last_execution_id = coalesce(?4, last_execution_id), \
             expires_unix_ms = iif(?3 IN ('paused', 'refused', 'stopped'), ?10 + retention_seconds * 1000, NULL) \
             WHERE id = ?1 AND generation = ?2",
        )
        .and_then(|mut statement| {
            statement.execute(params![
                row.spec.id.as_str(),
                transition.generation,
                transition.to.as_str(),
                transition.execution.as_ref().map(ExecutionId::as_str),
                transition.image_generation,
                deadline,
                transition.counts_pause,
                transition.counts_wake,
                transition.last_error.as_ref().map(error_json),
                transition.at_unix_ms,
            ])
        })
        .map_err(sql("commit a transition"))?;
    Ok(())
}

fn update_executions(
    connection: &Connection,
    machine: &MachineId,
    transition: &Transition,
) -> Result<(), StoreError> {
    let operation = sql("commit executions");
    let live = transition.execution.as_ref().map(ExecutionId::as_str);
    connection
        .prepare_cached(
            "UPDATE executions SET ended_unix_ms = ?2, end_reason = ?3 \
             WHERE machine_id = ?1 AND ended_unix_ms IS NULL AND id IS NOT ?4",
        )
        .and_then(|mut statement| {
            statement.execute(params![
                machine.as_str(),
                transition.at_unix_ms,
                transition.end_reason,
                live
            ])
        })
        .map_err(&operation)?;
    let Some(live) = live else { return Ok(()) };
    connection
        .prepare_cached(
            "INSERT OR IGNORE INTO executions (id, machine_id, started_by, started_unix_ms) VALUES (?1, ?2, ?3, ?4)",
        )
        .and_then(|mut statement| {
            statement.execute(params![live, machine.as_str(), transition.actor, transition.at_unix_ms])
        })
        .map_err(&operation)?;
    connection
        .prepare_cached("INSERT OR IGNORE INTO aliases (alias, machine_id) VALUES (?1, ?2)")
        .and_then(|mut statement| statement.execute([live, machine.as_str()]))
        .map_err(&operation)?;
    Ok(())
}
