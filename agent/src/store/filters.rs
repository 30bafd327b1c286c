//! Wake filters, each as its JSON.

use super::events::{self, NewEvent};
use super::rows::{get, parse};
use super::{Store, StoreError, sql};
use rusqlite::params;
use torpor_api::MachineId;
use torpor_api::http::WakeFilter;

impl Store {
    /// Every filter there is.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn wake_filters(&self) -> Result<Vec<(MachineId, WakeFilter)>, StoreError> {
        self.read("read wake filters", |tx| {
            let operation = sql("read wake filters");
            let mut statement = tx
                .prepare_cached("SELECT machine_id, rules FROM wake_filters")
                .map_err(&operation)?;
            let mut found = statement.query([]).map_err(&operation)?;
            let mut filters = Vec::new();
            while let Some(row) = found.next().map_err(&operation)? {
                let rules: String = get(row, "rules")?;
                let filter = serde_json::from_str(&rules).map_err(|_| StoreError::BadRow {
                    table: "wake_filters",
                    column: "rules",
                    value: rules.chars().take(64).collect(),
                })?;
                filters.push((parse(&get::<String>(row, "machine_id")?, "machine_id")?, filter));
            }
            Ok(filters)
        })
        .await
    }

    /// Set a machine's filter; one without rules takes it away.
    ///
    /// # Errors
    /// The machine is gone, or SQLite refuses.
    pub async fn set_wake_filter(
        &self,
        machine: MachineId,
        filter: WakeFilter,
        event: NewEvent,
    ) -> Result<(), StoreError> {
        self.write("set a wake filter", move |tx| {
            let operation = sql("set a wake filter");
            tx.execute(
                "DELETE FROM wake_filters WHERE machine_id = ?1",
                [machine.as_str()],
            )
            .map_err(&operation)?;
            if !filter.rules.is_empty() {
                let rules = serde_json::json!(filter).to_string();
                let inserted = tx.execute(
                    "INSERT INTO wake_filters (machine_id, rules) VALUES (?1, ?2)",
                    params![machine.as_str(), rules],
                );
                inserted.map_err(|error| match error.sqlite_error_code() {
                    Some(rusqlite::ErrorCode::ConstraintViolation) => StoreError::NoMachine {
                        id: machine.to_string(),
                    },
                    _ => operation(error),
                })?;
            }
            events::insert(tx, &event)
        })
        .await
    }
}
