//! Snapshots: made, found, listed, used, expired, removed.

use super::events::{self, NewEvent};
use super::machines::Idempotency;
use super::rows::{decode_json, get, parse, parse_optional};
use super::{Store, StoreError, sql};
use crate::machine::hypervisor::MachineSpec;
use rusqlite::{Connection, OptionalExtension, Row, params};
use std::collections::BTreeMap;
use torpor_api::http::SnapshotStatus;
use torpor_api::{ExecutionId, MachineId, MachineName, SnapshotId};

/// What a snapshot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SnapshotPurpose {
    /// A user asked for it.
    User,
    /// A fork goes through it, and nobody else sees it.
    Fork,
    /// Machines of a template start from it, and nobody else sees it.
    Warm,
}

impl SnapshotPurpose {
    const ALL: [Self; 3] = [Self::User, Self::Fork, Self::Warm];

    fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Fork => "fork",
            Self::Warm => "warm",
        }
    }
}

/// What is committed of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRow {
    /// Its identity.
    pub id: SnapshotId,
    /// Unique label.
    pub name: Option<MachineName>,
    /// What it is for.
    pub purpose: SnapshotPurpose,
    /// Where it stands.
    pub status: SnapshotStatus,
    /// The machine as it was; its ID is that of the source.
    pub spec: MachineSpec,
    /// The execution that ran then.
    pub execution: Option<ExecutionId>,
    /// What its maker says it holds.
    pub digest: Option<String>,
    /// Room that it takes.
    pub size_bytes: u64,
    /// Free key/value pairs of the user.
    pub metadata: BTreeMap<String, String>,
    /// How long it is kept unused.
    pub retention_seconds: Option<u64>,
    /// When that ends.
    pub expires_unix_ms: Option<u64>,
    /// When it was asked for.
    pub created_unix_ms: u64,
    /// When a machine was last made from it.
    pub last_used_unix_ms: u64,
}

/// A snapshot about to be taken.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// Its row; status, size and times are not looked at.
    pub row: SnapshotRow,
    /// A repeat of the same call answers the same snapshot.
    pub idempotency: Option<Idempotency>,
    /// Unix time in milliseconds.
    pub at_unix_ms: u64,
}

/// What came of an insertion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotCreated {
    /// A new row.
    New,
    /// The key or the digest was used before for this one.
    Before(SnapshotId),
}

/// Which snapshots are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotFilter {
    /// With this digest.
    pub digest: Option<String>,
    /// Of this machine.
    pub machine: Option<MachineId>,
    /// Younger than this one.
    pub after: Option<SnapshotId>,
    /// At most so many.
    pub limit: u32,
}

const COLUMNS: &str = "id, name, purpose, state, machine_id, execution_id, digest, template, template_digest, vcpus, \
     mem_mib, disk_mib, size_bytes, metadata, retention_seconds, expires_unix_ms, created_unix_ms, last_used_unix_ms";

impl Store {
    /// A new row in state `creating`.
    ///
    /// # Errors
    /// The name is taken, or the key was used with another body.
    pub async fn create_snapshot(&self, new: NewSnapshot) -> Result<SnapshotCreated, StoreError> {
        self.write("create a snapshot", move |tx| {
            if let Some(before) = used_before(tx, &new)? {
                return Ok(SnapshotCreated::Before(before));
            }
            insert(tx, &new)?;
            if let Some(key) = &new.idempotency {
                tx.execute(
                    "INSERT INTO snapshot_keys (key, body_digest, snapshot_id) VALUES (?1, ?2, ?3)",
                    params![key.key, key.body_digest, new.row.id.as_str()],
                )
                .map_err(sql("create a snapshot"))?;
            }
            Ok(SnapshotCreated::New)
        })
        .await
    }

    /// The snapshot is whole; its retention begins.
    ///
    /// # Errors
    /// It is gone, or SQLite refuses.
    pub async fn commit_snapshot(
        &self,
        id: SnapshotId,
        size_bytes: u64,
        event: NewEvent,
    ) -> Result<SnapshotRow, StoreError> {
        self.write("commit a snapshot", move |tx| {
            tx.execute(
                "UPDATE snapshots SET state = 'ready', size_bytes = ?2, last_used_unix_ms = ?3, \
                 execution_id = ?4, expires_unix_ms = ?3 + retention_seconds * 1000 \
                 WHERE id = ?1 AND state = 'creating'",
                params![
                    id.as_str(),
                    size_bytes,
                    event.at_unix_ms,
                    event.execution.as_ref().map(ExecutionId::as_str)
                ],
            )
            .map_err(sql("commit a snapshot"))?;
            events::insert(tx, &event)?;
            existing(tx, &id)
        })
        .await
    }

    /// The snapshot's row, whatever its purpose.
    ///
    /// # Errors
    /// SQLite refuses, or the row cannot be decoded.
    pub async fn snapshot(&self, id: &SnapshotId) -> Result<Option<SnapshotRow>, StoreError> {
        let id = id.clone();
        self.read("read a snapshot", move |tx| one(tx, "id = ?1", id.as_str()))
            .await
    }

    /// The user's snapshot that has this ID or name.
    ///
    /// # Errors
    /// SQLite refuses, or the row cannot be decoded.
    pub async fn find_snapshot(&self, text: &str) -> Result<Option<SnapshotRow>, StoreError> {
        let text = text.to_owned();
        self.read("find a snapshot", move |tx| {
            one(tx, "(id = ?1 OR name = ?1) AND purpose = 'user'", &text)
        })
        .await
    }

    /// The snapshot with this digest, whatever its purpose.
    ///
    /// # Errors
    /// SQLite refuses, or the row cannot be decoded.
    pub async fn snapshot_of_digest(&self, digest: &str) -> Result<Option<SnapshotRow>, StoreError> {
        let digest = digest.to_owned();
        self.read("find a snapshot", move |tx| one(tx, "digest = ?1", &digest))
            .await
    }

    /// Snapshots that users see, oldest first.
    ///
    /// # Errors
    /// `after` is no snapshot, SQLite refuses, or a row cannot be decoded.
    pub async fn snapshots(&self, filter: SnapshotFilter) -> Result<Vec<SnapshotRow>, StoreError> {
        self.read("list snapshots", move |tx| {
            let after: i64 = match &filter.after {
                None => 0,
                Some(id) => tx
                    .query_row("SELECT seq FROM snapshots WHERE id = ?1", [id.as_str()], |row| {
                        row.get(0)
                    })
                    .optional()
                    .map_err(sql("list snapshots"))?
                    .ok_or_else(|| missing(id))?,
            };
            let query = format!(
                "SELECT {COLUMNS} FROM snapshots WHERE seq > ?1 AND purpose = 'user' \
                 AND (?3 IS NULL OR digest = ?3) AND (?4 IS NULL OR machine_id = ?4) ORDER BY seq LIMIT ?2"
            );
            let machine = filter.machine.as_ref().map(MachineId::as_str);
            collect(tx, &query, params![after, filter.limit, filter.digest, machine])
        })
        .await
    }

    /// Every row that is not ready: what a dead torpord left half made or half deleted.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn unsettled_snapshots(&self) -> Result<Vec<SnapshotRow>, StoreError> {
        self.read("read unsettled snapshots", |tx| {
            // A fork's snapshot that outlived its torpord has no fork to serve.
            let query = format!("SELECT {COLUMNS} FROM snapshots WHERE state != 'ready' OR purpose = 'fork'");
            collect(tx, &query, [])
        })
        .await
    }

    /// IDs of all snapshots that are whole.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn ready_snapshots(&self) -> Result<Vec<SnapshotId>, StoreError> {
        self.read("read snapshots", |tx| {
            let operation = sql("read snapshots");
            let mut statement = tx
                .prepare("SELECT id FROM snapshots WHERE state = 'ready'")
                .map_err(&operation)?;
            let ids = statement
                .query_map([], |row| row.get::<_, String>(0))
                .map_err(&operation)?;
            ids.map(|id| parse(&id.map_err(&operation)?, "id")).collect()
        })
        .await
    }

    /// Change metadata, retention or both; the retention counts from now.
    ///
    /// # Errors
    /// The snapshot is gone, or SQLite refuses.
    pub async fn patch_snapshot(
        &self,
        id: SnapshotId,
        metadata: Option<BTreeMap<String, String>>,
        retention_seconds: Option<Option<u64>>,
        at_unix_ms: u64,
    ) -> Result<SnapshotRow, StoreError> {
        self.write("change a snapshot", move |tx| {
            let operation = sql("change a snapshot");
            if let Some(metadata) = &metadata {
                tx.execute(
                    "UPDATE snapshots SET metadata = ?2 WHERE id = ?1",
                    params![id.as_str(), serde_json::json!(metadata).to_string()],
                )
                .map_err(&operation)?;
            }
            if let Some(seconds) = retention_seconds {
                tx.execute(
                    "UPDATE snapshots SET retention_seconds = ?2, expires_unix_ms = ?3 + ?2 * 1000 WHERE id = ?1",
                    params![id.as_str(), seconds, at_unix_ms],
                )
                .map_err(&operation)?;
            }
            existing(tx, &id)
        })
        .await
    }

    /// A machine was made from it: its retention begins anew.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn use_snapshot(&self, id: SnapshotId, at_unix_ms: u64) -> Result<(), StoreError> {
        self.write("use a snapshot", move |tx| {
            tx.execute(
                "UPDATE snapshots SET last_used_unix_ms = ?2, \
                 expires_unix_ms = ?2 + retention_seconds * 1000 WHERE id = ?1",
                params![id.as_str(), at_unix_ms],
            )
            .map(drop)
            .map_err(sql("use a snapshot"))
        })
        .await
    }

    /// Mark it as being deleted: nobody finds its digest or name any more, and a restart finishes the deletion.
    /// `false` if there is none, or `only_if_expired_at` is given and its retention goes on.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn doom_snapshot(
        &self,
        id: SnapshotId,
        only_if_expired_at: Option<u64>,
    ) -> Result<bool, StoreError> {
        self.write("delete a snapshot", move |tx| {
            tx.execute(
                "UPDATE snapshots SET state = 'deleting', digest = NULL, name = NULL WHERE id = ?1 \
                 AND (?2 IS NULL OR expires_unix_ms <= ?2)",
                params![id.as_str(), only_if_expired_at],
            )
            .map(|n_rows| n_rows > 0)
            .map_err(sql("delete a snapshot"))
        })
        .await
    }

    /// Forget it.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn remove_snapshot(&self, id: SnapshotId, event: Option<NewEvent>) -> Result<(), StoreError> {
        self.write("remove a snapshot", move |tx| {
            let removed = tx
                .execute("DELETE FROM snapshots WHERE id = ?1", [id.as_str()])
                .map_err(sql("remove a snapshot"))?;
            match event {
                Some(event) if removed == 1 => events::insert(tx, &event),
                Some(_) | None => Ok(()),
            }
        })
        .await
    }

    /// When the first retention ends.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn next_snapshot_expiry(&self) -> Result<Option<u64>, StoreError> {
        self.read("read retentions", |tx| {
            tx.query_row(
                "SELECT min(expires_unix_ms) FROM snapshots WHERE expires_unix_ms IS NOT NULL AND state = 'ready'",
                [],
                |row| row.get(0),
            )
            .map_err(sql("read retentions"))
        })
        .await
    }

    /// Snapshots whose retention has ended.
    ///
    /// # Errors
    /// SQLite refuses, or a row cannot be decoded.
    pub async fn expired_snapshots(&self, at_unix_ms: u64) -> Result<Vec<SnapshotRow>, StoreError> {
        self.read("read retentions", move |tx| {
            let query = format!(
                "SELECT {COLUMNS} FROM snapshots WHERE expires_unix_ms <= ?1 AND state = 'ready' \
                 ORDER BY expires_unix_ms LIMIT 64"
            );
            collect(tx, &query, params![at_unix_ms])
        })
        .await
    }
}

fn used_before(connection: &Connection, new: &NewSnapshot) -> Result<Option<SnapshotId>, StoreError> {
    let operation = sql("look up a snapshot");
    if let Some(key) = &new.idempotency {
        let found: Option<(String, String)> = connection
            .query_row(
                "SELECT body_digest, snapshot_id FROM snapshot_keys WHERE key = ?1",
                [&key.key],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .optional()
            .map_err(&operation)?;
        match found {
            Some((digest, id)) if digest == key.body_digest => return parse(&id, "snapshot_id").map(Some),
            Some(_) => return Err(StoreError::KeyReused),
            None => {}
        }
    }
    let Some(digest) = &new.row.digest else {
        return Ok(None);
    };
    Ok(one(connection, "digest = ?1", digest)?.map(|row| row.id))
}

fn insert(connection: &Connection, new: &NewSnapshot) -> Result<(), StoreError> {
    let row = &new.row;
    let inserted = connection.execute(
        "INSERT INTO snapshots (id, name, purpose, state, machine_id, execution_id, digest, template, template_digest, \
         vcpus, mem_mib, disk_mib, metadata, retention_seconds, created_unix_ms, last_used_unix_ms) \
         VALUES (?1, ?2, ?3, 'creating', ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?14)",
        params![
            row.id.as_str(),
            row.name.as_ref().map(MachineName::as_str),
            row.purpose.as_str(),
            row.spec.id.as_str(),
            row.execution.as_ref().map(ExecutionId::as_str),
            row.digest,
            row.spec.template,
            row.spec.template_digest,
            row.spec.vcpus,
            row.spec.mem_mib,
            row.spec.disk_mib,
            serde_json::json!(row.metadata).to_string(),
            row.retention_seconds,
            new.at_unix_ms,
        ],
    );
    match inserted {
        Ok(_) => Ok(()),
        Err(rusqlite::Error::SqliteFailure(_, Some(text))) if text.contains("snapshots.name") => {
            Err(StoreError::NameTaken {
                name: row.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            })
        }
        Err(source) => Err(sql("create a snapshot")(source)),
    }
}

fn missing(id: &SnapshotId) -> StoreError {
    StoreError::NoSnapshot { id: id.to_string() }
}

fn existing(connection: &Connection, id: &SnapshotId) -> Result<SnapshotRow, StoreError> {
    one(connection, "id = ?1", id.as_str())?.ok_or_else(|| missing(id))
}

fn one(connection: &Connection, condition: &str, value: &str) -> Result<Option<SnapshotRow>, StoreError> {
    let query = format!("SELECT {COLUMNS} FROM snapshots WHERE {condition}");
    Ok(collect(connection, &query, params![value])?.into_iter().next())
}

fn collect(
    connection: &Connection,
    query: &str,
    values: impl rusqlite::Params,
) -> Result<Vec<SnapshotRow>, StoreError> {
    let operation = sql("read snapshots");
    let mut statement = connection.prepare_cached(query).map_err(&operation)?;
    let mut found = statement.query(values).map_err(&operation)?;
    let mut rows = Vec::new();
    while let Some(row) = found.next().map_err(&operation)? {
        rows.push(decode(row)?);
    }
    Ok(rows)
}

fn decode(row: &Row<'_>) -> Result<SnapshotRow, StoreError> {
    let bad = |column, value: &str| StoreError::BadRow {
        table: "snapshots",
        column,
        value: value.chars().take(64).collect(),
    };
    let (state, purpose): (String, String) = (get(row, "state")?, get(row, "purpose")?);
    let status = match state.as_str() {
        "creating" => SnapshotStatus::Creating,
        "ready" => SnapshotStatus::Ready,
        "deleting" => SnapshotStatus::Deleting,
        other => return Err(bad("state", other)),
    };
    Ok(SnapshotRow {
        id: parse(&get::<String>(row, "id")?, "id")?,
        name: parse_optional(get(row, "name")?, "name")?,
        purpose: SnapshotPurpose::ALL
            .into_iter()
            .find(|known| known.as_str() == purpose)
            .ok_or_else(|| bad("purpose", &purpose))?,
        status,
        spec: MachineSpec {
            id: parse(&get::<String>(row, "machine_id")?, "machine_id")?,
            template: get(row, "template")?,
            template_digest: get(row, "template_digest")?,
            vcpus: get(row, "vcpus")?,
            mem_mib: get(row, "mem_mib")?,
            disk_mib: get(row, "disk_mib")?,
        },
        execution: parse_optional(get(row, "execution_id")?, "execution_id")?,
        digest: get(row, "digest")?,
        size_bytes: get(row, "size_bytes")?,
        metadata: decode_json(&get::<String>(row, "metadata")?, "metadata")?,
        retention_seconds: get(row, "retention_seconds")?,
        expires_unix_ms: get(row, "expires_unix_ms")?,
        created_unix_ms: get(row, "created_unix_ms")?,
        last_used_unix_ms: get(row, "last_used_unix_ms")?,
    })
}
