//! Machines: made, found, listed, their policies, their leases, removed.

use super::events::{self, NewEvent};
use super::rows::{self, MachineRow, lease_action_text, lease_mode_text, parse};
use super::{Store, StoreError, services, sql};
use crate::machine::fleet::Reshape;
use crate::machine::hypervisor::MachineSpec;
use rusqlite::{Connection, OptionalExtension, params};
use std::collections::BTreeMap;
use torpor_api::activity::ActivityPolicy;
use torpor_api::http::{PatchWake, ServiceSpec, WakePolicy};
use torpor_api::{ErrorCode, LeasePolicy, MachineId, MachineName, SnapshotId, ids::spellings};

/// A machine about to be created.
#[derive(Debug, Clone)]
pub struct NewMachine {
    /// What must be known to run it.
    pub spec: MachineSpec,
    /// Unique label.
    pub name: Option<MachineName>,
    /// Lease policy; its window starts when the guest answers.
    pub lease: Option<LeasePolicy>,
    /// What counts as use of it.
    pub activity: ActivityPolicy,
    /// How long it is kept while it is not awake.
    pub retention_seconds: Option<u64>,
    /// Wake switches.
    pub wake: WakePolicy,
    /// Services to expose.
    pub services: Vec<ServiceSpec>,
    /// Free key/value pairs of the user.
    pub metadata: BTreeMap<String, String>,
    /// Environment of its commands, below what a command sets itself.
    pub env: BTreeMap<String, String>,
    /// Working directory of commands that name none.
    pub cwd: Option<String>,
    /// The snapshot that it goes on from.
    pub snapshot: Option<SnapshotId>,
    /// Nobody is to see it; a restart deletes it.
    pub hidden: bool,
    /// A repeat of the same call answers the same machine.
    pub idempotency: Option<Idempotency>,
    /// Goes to the events table in the same transaction.
    pub event: NewEvent,
}

/// An Idempotency-Key and what it was sent with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// The header.
    pub key: String,
    /// Digest of the body.
    pub body_digest: String,
}

/// Which machines a list shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineFilter {
    /// Made from this template.
    pub template: Option<String>,
    /// Having all of these pairs of metadata.
    pub metadata: BTreeMap<String, String>,
}

/// What came of an insertion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// A new row.
    New,
    /// The key was used before for this machine.
    Before(MachineId),
}

const INSERT_MACHINE: &str = "INSERT INTO machines (id, name, template, template_digest, vcpus, mem_mib, disk_mib, \
     state, lease_seconds, lease_action, lease_mode, wake_http, wake_ssh, wake_tcp, wake_api, metadata, \
     created_unix_ms, last_used_unix_ms, env, cwd, snapshot_id, hidden, retention_seconds, activity) \
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 'creating', ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?16, ?17, ?18, ?19, ?20, ?21, ?22)";

impl Store {
    /// A new row in state `creating`, with its services and its ID as an alias.
    ///
    /// # Errors
    /// The name is taken, the key was used with another body, or no port is free.
    pub async fn create_machine(&self, new: NewMachine) -> Result<Created, StoreError> {
        self.write("create a machine", move |tx| {
            if let Some(before) = new
                .idempotency
                .as_ref()
                .map(|key| used_before(tx, key))
                .transpose()?
                .flatten()
            {
                return Ok(Created::Before(before));
            }
            insert_machine(tx, &new)?;
            let id = &new.spec.id;
            tx.execute(
                "INSERT INTO aliases (alias, machine_id) VALUES (?1, ?1)",
                [id.as_str()],
            )
            .map_err(sql("create a machine"))?;
            if let Some(key) = &new.idempotency {
                tx.execute(
                    "INSERT INTO idempotency_keys (key, body_digest, machine_id) VALUES (?1, ?2, ?3)",
                    params![key.key, key.body_digest, id.as_str()],
                )
                .map_err(sql("create a machine"))?;
            }
            for service in &new.services {
                services::insert(tx, id, service)?;
            }
            events::insert(tx, &new.event)?;
            Ok(Created::New)
        })
        .await
    }

    /// The machine's row.
    ///
    /// # Errors
    /// SQLite refuses, or the row cannot be decoded.
    pub async fn machine(&self, id: &MachineId) -> Result<Option<MachineRow>, StoreError> {
        let id = id.clone();
        self.read("read a machine", move |tx| rows::machine(tx, &id))
            .await
    }

    /// The machine that has this ID, had this execution or has this name.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn resolve(&self, text: &str) -> Result<Option<MachineId>, StoreError> {
        let text = text.to_owned();
        self.read("resolve a machine", move |tx| {
            let operation = sql("resolve a machine");
            // An ID of a façade is spelled like one of ours, or like one of our executions'.
            let spellings = serde_json::json!(spellings(&text)).to_string();
            tx.prepare_cached(
                "SELECT machine_id FROM json_each(?1) AS spelling JOIN aliases ON alias = spelling.value \
                 UNION ALL SELECT id FROM machines WHERE name = ?2",
            )
            .and_then(|mut statement| {
                statement
                    .query_row([&spellings, &text], |row| row.get::<_, String>(0))
                    .optional()
            })
            .map_err(&operation)?
            .map(|id| parse(&id, "machine_id"))
            .transpose()
        })
        .await
    }

    /// Machines that the filter lets through, oldest first, after this one.
    ///
    /// # Errors
    /// `after` is no machine, SQLite refuses, or a row cannot be decoded.
    pub async fn list(
        &self,
        filter: MachineFilter,
        after: Option<MachineId>,
        limit: u32,
    ) -> Result<Vec<MachineRow>, StoreError> {
        self.read("list machines", move |tx| {
            let operation = sql("list machines");
            let after_seq: i64 = match &after {
                None => 0,
                Some(id) => tx
                    .query_row("SELECT seq FROM machines WHERE id = ?1", [id.as_str()], |row| {
                        row.get(0)
                    })
                    .optional()
                    .map_err(&operation)?
                    .ok_or_else(|| StoreError::NoMachine { id: id.to_string() })?,
            };
            // Every wanted pair has to be among the machine's own.
            let query = format!(
                "SELECT {} FROM machines WHERE seq > ?1 AND hidden = 0 AND (?3 IS NULL OR template = ?3) AND NOT EXISTS \
                 (SELECT 1 FROM json_each(?4) AS wanted WHERE NOT EXISTS (SELECT 1 FROM json_each(machines.metadata) \
                 AS own WHERE own.key = wanted.key AND own.value = wanted.value)) ORDER BY seq LIMIT ?2",
                rows::MACHINE_COLUMNS
            );
            let wanted = serde_json::json!(filter.metadata).to_string();
            collect(tx, &query, params![after_seq, limit, filter.template, wanted])
        })
        .await
    }

    /// Change the shape of a machine that sleeps or is off: its next boot has the new one.
    ///
    /// # Errors
    /// The machine is gone or awake, or SQLite refuses.
    pub async fn reshape(&self, id: MachineId, change: Reshape, event: NewEvent) -> Result<(), StoreError> {
        self.write("reshape a machine", move |tx| {
            let changed = tx
                .execute(
                    "UPDATE machines SET vcpus = coalesce(?2, vcpus), mem_mib = coalesce(?3, mem_mib), \
                     disk_mib = max(coalesce(?4, disk_mib), disk_mib) \
                     WHERE id = ?1 AND state IN ('paused', 'refused', 'stopped')",
                    params![id.as_str(), change.vcpus, change.mem_mib, change.disk_mib],
                )
                .map_err(sql("reshape a machine"))?;
            if changed == 0 {
                existing(tx, &id)?;
                return Err(StoreError::Refused {
                    code: ErrorCode::TransitionInProgress,
                    reason: format!("machine {id} woke up meanwhile"),
                });
            }
            events::insert(tx, &event)
        })
        .await
    }

    /// Replace the machine's metadata.
    ///
    /// # Errors
    /// The machine is gone, or SQLite refuses.
    pub async fn set_metadata(
        &self,
        id: MachineId,
        metadata: BTreeMap<String, String>,
        event: NewEvent,
    ) -> Result<(), StoreError> {
        self.write("set metadata", move |tx| {
            let metadata = serde_json::json!(metadata).to_string();
            let changed = tx
                .execute(
                    "UPDATE machines SET metadata = ?2 WHERE id = ?1",
                    params![id.as_str(), metadata],
                )
                .map_err(sql("set metadata"))?;
            if changed == 0 {
                return Err(StoreError::NoMachine { id: id.to_string() });
            }
            events::insert(tx, &event)
        })
        .await
    }

    /// Machines that were awake or half done: what a starting torpord must look at one by one.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn unsettled(&self) -> Result<Vec<MachineRow>, StoreError> {
        self.read("read unsettled machines", |tx| {
            let query = format!(
                "SELECT {} FROM machines WHERE state IN ('creating', 'running', 'deleting') ORDER BY seq",
                rows::MACHINE_COLUMNS
            );
            collect(tx, &query, [])
        })
        .await
    }

    /// Hidden machines were of a torpord that is gone: let recovery delete them.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn doom_hidden(&self) -> Result<(), StoreError> {
        self.write("doom hidden machines", |tx| {
            tx.execute("UPDATE machines SET state = 'deleting' WHERE hidden = 1", [])
                .map(drop)
                .map_err(sql("doom hidden machines"))
        })
        .await
    }

    /// The machine that was made with this Idempotency-Key.
    ///
    /// # Errors
    /// The key was used with another body, or SQLite refuses.
    pub async fn machine_of_key(&self, key: Idempotency) -> Result<Option<MachineId>, StoreError> {
        self.read("look up an Idempotency-Key", move |tx| used_before(tx, &key))
            .await
    }

    /// Number of machines by committed state.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn counts(&self) -> Result<BTreeMap<String, u64>, StoreError> {
        self.read("count machines", |tx| {
            let operation = sql("count machines");
            let mut statement = tx
                .prepare_cached("SELECT state, count(*) FROM machines GROUP BY state")
                .map_err(&operation)?;
            let counts = statement
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
                .map_err(&operation)?;
            counts.collect::<Result<_, _>>().map_err(&operation)
        })
        .await
    }

    /// Set or take away the lease, unless `check` refuses the row as it would be. An awake machine gets a whole
    /// window from now.
    ///
    /// # Errors
    /// The machine is gone, or SQLite refuses.
    pub async fn set_lease(
        &self,
        id: MachineId,
        lease: Option<LeasePolicy>,
        event: NewEvent,
        check: fn(&MachineRow) -> Result<(), StoreError>,
    ) -> Result<MachineRow, StoreError> {
        self.write("set a lease", move |tx| {
            let deadline = lease.map(|lease| {
                event
                    .at_unix_ms
                    .saturating_add(lease.seconds.saturating_mul(1000))
            });
            tx.execute(
                "UPDATE machines SET lease_seconds = ?2, lease_action = ?3, lease_mode = ?4, \
                 deadline_unix_ms = iif(state = 'running', ?5, NULL), \
                 lease_check_unix_ms = iif(state = 'running', ?5, NULL) WHERE id = ?1",
                params![
                    id.as_str(),
                    lease.map(|lease| lease.seconds),
                    lease.map(|lease| lease_action_text(lease.action)),
                    lease.map(|lease| lease_mode_text(lease.mode)),
                    deadline,
                ],
            )
            .map_err(sql("set a lease"))?;
            events::insert(tx, &event)?;
            let row = existing(tx, &id)?;
            check(&row)?;
            Ok(row)
        })
        .await
    }

    /// Change the wake switches that are given, unless `check` refuses the row as it would be.
    ///
    /// # Errors
    /// The machine is gone, or SQLite refuses.
    pub async fn patch_wake(
        &self,
        id: MachineId,
        patch: PatchWake,
        event: NewEvent,
        check: fn(&MachineRow) -> Result<(), StoreError>,
    ) -> Result<MachineRow, StoreError> {
        self.write("change wake switches", move |tx| {
            tx.execute(
                "UPDATE machines SET wake_http = coalesce(?2, wake_http), wake_ssh = coalesce(?3, wake_ssh), \
                 wake_tcp = coalesce(?4, wake_tcp), wake_api = coalesce(?5, wake_api) WHERE id = ?1",
                params![id.as_str(), patch.http, patch.ssh, patch.tcp, patch.api],
            )
            .map_err(sql("change wake switches"))?;
            events::insert(tx, &event)?;
            let row = existing(tx, &id)?;
            check(&row)?;
            Ok(row)
        })
        .await
    }

    /// Forget the machine with its aliases, executions, services and keys.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn remove_machine(&self, id: MachineId, event: NewEvent) -> Result<(), StoreError> {
        self.write("remove a machine", move |tx| {
            let removed = tx
                .execute("DELETE FROM machines WHERE id = ?1", [id.as_str()])
                .map_err(sql("remove a machine"))?;
            if removed == 1 {
                events::insert(tx, &event)
            } else {
                Ok(())
            }
        })
        .await
    }
}

fn collect(
    connection: &Connection,
    query: &str,
    values: impl rusqlite::Params,
) -> Result<Vec<MachineRow>, StoreError> {
    let operation = sql("read machines");
    let mut statement = connection.prepare_cached(query).map_err(&operation)?;
    let mut found = statement.query(values).map_err(&operation)?;
    let mut machines = Vec::new();
    while let Some(row) = found.next().map_err(&operation)? {
        machines.push(rows::decode_machine(row)?);
    }
    machines
        .into_iter()
        .map(|row| rows::with_services(connection, row))
        .collect()
}

fn existing(connection: &Connection, id: &MachineId) -> Result<MachineRow, StoreError> {
    rows::machine(connection, id)?.ok_or_else(|| StoreError::NoMachine { id: id.to_string() })
}

fn used_before(connection: &Connection, key: &Idempotency) -> Result<Option<MachineId>, StoreError> {
    let found: Option<(String, String)> = connection
        .query_row(
            "SELECT body_digest, machine_id FROM idempotency_keys WHERE key = ?1",
            [&key.key],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()
        .map_err(sql("look up an Idempotency-Key"))?;
    match found {
        None => Ok(None),
        Some((digest, machine)) if digest == key.body_digest => parse(&machine, "machine_id").map(Some),
        Some(_) => Err(StoreError::KeyReused),
    }
}

fn insert_machine(connection: &Connection, new: &NewMachine) -> Result<(), StoreError> {
    let metadata = serde_json::json!(new.metadata).to_string();
    let spec = &new.spec;
    let inserted = connection.execute(
        INSERT_MACHINE,
        params![
            spec.id.as_str(),
            new.name.as_ref().map(MachineName::as_str),
            spec.template,
            spec.template_digest,
            spec.vcpus,
            spec.mem_mib,
            spec.disk_mib,
            new.lease.map(|lease| lease.seconds),
            new.lease.map(|lease| lease_action_text(lease.action)),
            new.lease.map(|lease| lease_mode_text(lease.mode)),
            new.wake.http,
            new.wake.ssh,
            new.wake.tcp,
            new.wake.api,
            metadata,
            new.event.at_unix_ms,
            serde_json::json!(new.env).to_string(),
            new.cwd,
            new.snapshot.as_ref().map(SnapshotId::as_str),
            new.hidden,
            new.retention_seconds,
            serde_json::json!(new.activity).to_string(),
        ],
    );
    match inserted {
        Ok(_) => Ok(()),
        Err(error) if violates_unique_name(&error) => Err(StoreError::NameTaken {
            name: new.name.as_ref().map(ToString::to_string).unwrap_or_default(),
        }),
        Err(source) => Err(StoreError::Sql {
            operation: "create a machine",
            source,
        }),
    }
}

fn violates_unique_name(error: &rusqlite::Error) -> bool {
    matches!(error, rusqlite::Error::SqliteFailure(_, Some(text)) if text.contains("machines.name"))
}
