//! Leases and retentions by time: found by an index, claimed one batch at a time.

use super::events::{self, NewEvent};
use super::rows::{self, get, lease_action, lease_mode, parse};
use super::{Store, StoreError, sql};
use rusqlite::params;
use torpor_api::activity::{ActivityPolicy, PatchActivity};
use torpor_api::{LeasePolicy, MachineId};

/// A lease whose deadline has passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueLease {
    /// The machine.
    pub machine: MachineId,
    /// The deadline that passed.
    pub deadline_unix_ms: u64,
    /// The policy in force.
    pub policy: LeasePolicy,
    /// What counts as use of the machine.
    pub activity: ActivityPolicy,
}

const LEASE_COLUMNS: &str = "id, deadline_unix_ms, lease_seconds, lease_action, lease_mode, activity";

fn due_lease(row: &rusqlite::Row<'_>) -> Result<DueLease, StoreError> {
    Ok(DueLease {
        machine: parse(&get::<String>(row, "id")?, "id")?,
        deadline_unix_ms: get(row, "deadline_unix_ms")?,
        policy: LeasePolicy {
            seconds: get(row, "lease_seconds")?,
            action: lease_action(&get::<String>(row, "lease_action")?)?,
            mode: lease_mode(&get::<String>(row, "lease_mode")?)?,
        },
        activity: rows::decode_json(&get::<String>(row, "activity")?, "activity")?,
    })
}

impl Store {
    /// When the next lease wants to be looked at.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn next_lease_check(&self) -> Result<Option<u64>, StoreError> {
        self.read("read the next deadline", |tx| {
            tx.prepare_cached(
                "SELECT min(lease_check_unix_ms) FROM machines WHERE lease_check_unix_ms IS NOT NULL",
            )
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .map_err(sql("read the next deadline"))
        })
        .await
    }

    /// Leases that are due, each looked at again at `next_check` if nothing comes of it.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn claim_due_leases(
        &self,
        now_unix_ms: u64,
        next_check_unix_ms: u64,
        limit: u32,
    ) -> Result<Vec<DueLease>, StoreError> {
        self.write("claim due leases", move |tx| {
            let operation = sql("claim due leases");
            let mut statement = tx
                .prepare_cached(&format!(
                    "UPDATE machines SET lease_check_unix_ms = ?2 WHERE id IN \
                     (SELECT id FROM machines WHERE lease_check_unix_ms <= ?1 ORDER BY lease_check_unix_ms LIMIT ?3) \
                     RETURNING {LEASE_COLUMNS}"
                ))
                .map_err(&operation)?;
            let mut found =
                statement.query(params![now_unix_ms, next_check_unix_ms, limit]).map_err(&operation)?;
            let mut due = Vec::new();
            while let Some(row) = found.next().map_err(&operation)? {
                due.push(due_lease(row)?);
            }
            Ok(due)
        })
        .await
    }

    /// Leases that pause their machine and end by then, at most `limit` of them.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn pauses_due_by(&self, by_unix_ms: u64, limit: u32) -> Result<Vec<DueLease>, StoreError> {
        self.read("read the next deadlines", move |tx| {
            let operation = sql("read the next deadlines");
            let mut statement = tx
                .prepare_cached(&format!(
                    "SELECT {LEASE_COLUMNS} FROM machines \
                     WHERE lease_check_unix_ms <= ?1 AND lease_action = 'pause' ORDER BY lease_check_unix_ms LIMIT ?2"
                ))
                .map_err(&operation)?;
            let mut found = statement.query(params![by_unix_ms, limit]).map_err(&operation)?;
            let mut due = Vec::new();
            while let Some(row) = found.next().map_err(&operation)? {
                due.push(due_lease(row)?);
            }
            Ok(due)
        })
        .await
    }

    /// When the first retention of a machine ends.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn next_machine_expiry(&self) -> Result<Option<u64>, StoreError> {
        self.read("read retentions of machines", |tx| {
            tx.query_row(
                "SELECT min(expires_unix_ms) FROM machines WHERE expires_unix_ms IS NOT NULL",
                [],
                |row| row.get(0),
            )
            .map_err(sql("read retentions of machines"))
        })
        .await
    }

    /// Machines whose retention has ended, at most `limit` of them.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn expired_machines(&self, at_unix_ms: u64, limit: u32) -> Result<Vec<MachineId>, StoreError> {
        self.read("read retentions of machines", move |tx| {
            let operation = sql("read retentions of machines");
            let mut statement = tx
                .prepare_cached(
                    "SELECT id FROM machines WHERE expires_unix_ms <= ?1 ORDER BY expires_unix_ms LIMIT ?2",
                )
                .map_err(&operation)?;
            let ids = statement
                .query_map(params![at_unix_ms, limit], |row| row.get::<_, String>(0))
                .map_err(&operation)?;
            ids.map(|id| parse(&id.map_err(&operation)?, "id")).collect()
        })
        .await
    }

    /// Set or take away the retention; for a machine that is not awake it counts from now.
    ///
    /// # Errors
    /// The machine is gone, or SQLite refuses.
    pub async fn set_retention(
        &self,
        id: MachineId,
        seconds: Option<u64>,
        event: NewEvent,
    ) -> Result<(), StoreError> {
        self.write("set a retention", move |tx| {
            let changed = tx
                .execute(
                    "UPDATE machines SET retention_seconds = ?2, expires_unix_ms = \
                     iif(state IN ('paused', 'refused', 'stopped'), ?3 + ?2 * 1000, NULL) WHERE id = ?1",
                    params![id.as_str(), seconds, event.at_unix_ms],
                )
                .map_err(sql("set a retention"))?;
            if changed == 0 {
                return Err(StoreError::NoMachine { id: id.to_string() });
            }
            events::insert(tx, &event)
        })
        .await
    }

    /// Change what counts as use of the machine; answers the policy as it is then.
    ///
    /// # Errors
    /// The machine is gone, or SQLite refuses.
    pub async fn patch_activity(
        &self,
        id: MachineId,
        patch: PatchActivity,
        event: NewEvent,
    ) -> Result<ActivityPolicy, StoreError> {
        self.write("change what counts as activity", move |tx| {
            let row = rows::machine(tx, &id)?.ok_or_else(|| StoreError::NoMachine { id: id.to_string() })?;
            let policy = patch.of(row.activity);
            tx.execute(
                "UPDATE machines SET activity = ?2 WHERE id = ?1",
                params![id.as_str(), serde_json::json!(policy).to_string()],
            )
            .map_err(sql("change what counts as activity"))?;
            events::insert(tx, &event)?;
            Ok(policy)
        })
        .await
    }

    /// A sliding lease slid: move the deadline, unless somebody else moved it meanwhile.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn slide_lease(
        &self,
        id: MachineId,
        from_unix_ms: u64,
        to_unix_ms: u64,
    ) -> Result<(), StoreError> {
        self.write("slide a lease", move |tx| {
            tx.execute(
                "UPDATE machines SET deadline_unix_ms = ?3, lease_check_unix_ms = ?3 \
                 WHERE id = ?1 AND deadline_unix_ms = ?2",
                params![id.as_str(), from_unix_ms, to_unix_ms],
            )
            .map_err(sql("slide a lease"))?;
            Ok(())
        })
        .await
    }
}
