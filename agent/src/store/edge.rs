//! Edge keys, and the grants of signed URLs with their counters.
//!
//! A grant that ran out long ago is dropped when its service gets another one, so the table stays bounded.

use super::events::{self, NewEvent};
use super::rows::{get, parse};
use super::{Store, StoreError, sql};
use rusqlite::{Connection, OptionalExtension, Row, params};
use torpor_api::http::GrantTransport;
use torpor_api::{ErrorCode, GrantId, MachineId, limits};

/// A grant that ran out is shown for this long, in milliseconds.
const KEPT_MS: u64 = 7 * 86_400_000;
const MOST_LISTED: u32 = 1000;

/// A key of edge tokens, with its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct EdgeKeyRow {
    /// As it stands in tokens.
    pub id: String,
    /// What tokens are signed with.
    pub secret: Vec<u8>,
    /// Unix time of its making in milliseconds.
    pub created_unix_ms: u64,
}

/// What is stored of a grant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrantRow {
    /// Identity.
    pub id: GrantId,
    /// The machine.
    pub machine: MachineId,
    /// Port in the guest.
    pub port: u16,
    /// What it is good for.
    pub transport: GrantTransport,
    /// Unix time of its making in milliseconds.
    pub issued_unix_ms: u64,
    /// Unix time of its end in milliseconds.
    pub expires_unix_ms: u64,
    /// When it was taken back.
    pub revoked_unix_ms: Option<u64>,
    /// What came of it.
    pub usage: GrantUsage,
}

/// Use of a grant: all of it in a row, what is new in an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GrantUsage {
    /// When its token was first taken.
    pub first_unix_ms: Option<u64>,
    /// When its token was last taken.
    pub last_unix_ms: Option<u64>,
    /// Requests that did not upgrade.
    pub http_requests: u64,
    /// Upgrades.
    pub websockets: u64,
    /// Payload bytes towards the guest.
    pub to_guest_bytes: u64,
    /// Payload bytes from the guest.
    pub from_guest_bytes: u64,
}

impl GrantUsage {
    /// Both together.
    #[must_use]
    pub fn and(self, newer: Self) -> Self {
        Self {
            first_unix_ms: self.first_unix_ms.or(newer.first_unix_ms),
            last_unix_ms: self.last_unix_ms.max(newer.last_unix_ms),
            http_requests: self.http_requests.saturating_add(newer.http_requests),
            websockets: self.websockets.saturating_add(newer.websockets),
            to_guest_bytes: self.to_guest_bytes.saturating_add(newer.to_guest_bytes),
            from_guest_bytes: self.from_guest_bytes.saturating_add(newer.from_guest_bytes),
        }
    }
}

const GRANT_COLUMNS: &str = "id, machine_id, port, transport, issued_unix_ms, expires_unix_ms, revoked_unix_ms, \
     first_used_unix_ms, last_used_unix_ms, http_requests, websockets, to_guest_bytes, from_guest_bytes";

impl Store {
    /// All edge keys, newest first.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn edge_keys(&self) -> Result<Vec<EdgeKeyRow>, StoreError> {
        self.read("read edge keys", |tx| keys(tx)).await
    }

    /// All edge keys, newest first; `first` is the first one if there was none.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn edge_keys_or(&self, first: EdgeKeyRow) -> Result<Vec<EdgeKeyRow>, StoreError> {
        self.write("make an edge key", move |tx| {
            let found = keys(tx)?;
            if found.is_empty() {
                insert_key(tx, &first)?;
                return Ok(vec![first]);
            }
            Ok(found)
        })
        .await
    }

    /// Add a key that signs from now on. Keys made before `drop_before_unix_ms` are forgotten, and their tokens
    /// with them.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn rotate_edge_key(
        &self,
        key: EdgeKeyRow,
        drop_before_unix_ms: u64,
    ) -> Result<Vec<EdgeKeyRow>, StoreError> {
        self.write("rotate the edge key", move |tx| {
            // A key signed until the next one was made; its last token outlives that by a token's longest life.
            tx.execute(
                "DELETE FROM edge_keys WHERE ?1 > \
                 (SELECT coalesce(min(later.created_unix_ms), ?2) FROM edge_keys later WHERE later.seq > edge_keys.seq)",
                params![drop_before_unix_ms, key.created_unix_ms],
            )
            .map_err(sql("rotate the edge key"))?;
            insert_key(tx, &key)?;
            keys(tx)
        })
        .await
    }

    /// Keep a new grant.
    ///
    /// # Errors
    /// The machine is gone or has too many grants.
    pub async fn insert_grant(&self, grant: GrantRow, event: NewEvent) -> Result<(), StoreError> {
        self.write("make a grant", move |tx| {
            let operation = sql("make a grant");
            tx.execute(
                "DELETE FROM grants WHERE machine_id = ?1 AND expires_unix_ms < ?2",
                params![grant.machine.as_str(), grant.issued_unix_ms.saturating_sub(KEPT_MS)],
            )
            .map_err(&operation)?;
            let n_active: u32 = tx
                .query_row(
                    "SELECT count(*) FROM grants WHERE machine_id = ?1 AND expires_unix_ms > ?2 AND revoked_unix_ms IS NULL",
                    params![grant.machine.as_str(), grant.issued_unix_ms],
                    |row| row.get(0),
                )
                .map_err(&operation)?;
            if n_active >= limits::MAX_ACTIVE_GRANTS {
                return Err(StoreError::Refused {
                    code: ErrorCode::CapacityExceeded,
                    reason: format!("machine {} has {n_active} active grants, which is the most", grant.machine),
                });
            }
            let inserted = tx.execute(
                "INSERT INTO grants (id, machine_id, port, transport, issued_unix_ms, expires_unix_ms) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    grant.id.as_str(),
                    grant.machine.as_str(),
                    grant.port,
                    transport_text(grant.transport),
                    grant.issued_unix_ms,
                    grant.expires_unix_ms
                ],
            );
            inserted.map_err(|error| match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::ConstraintViolation) => StoreError::NoMachine { id: grant.machine.to_string() },
                _ => operation(error),
            })?;
            events::insert(tx, &event)
        })
        .await
    }

    /// Grants of a machine, newest first, of one port if given.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn grants(&self, machine: MachineId, port: Option<u16>) -> Result<Vec<GrantRow>, StoreError> {
        self.read("read grants", move |tx| {
            let operation = sql("read grants");
            let query = format!(
                "SELECT {GRANT_COLUMNS} FROM grants WHERE machine_id = ?1 AND (?2 IS NULL OR port = ?2) \
                 ORDER BY seq DESC LIMIT ?3"
            );
            let mut statement = tx.prepare_cached(&query).map_err(&operation)?;
            let mut found = statement
                .query(params![machine.as_str(), port, MOST_LISTED])
                .map_err(&operation)?;
            let mut grants = Vec::new();
            while let Some(row) = found.next().map_err(&operation)? {
                grants.push(decode(row)?);
            }
            Ok(grants)
        })
        .await
    }

    /// Take a grant of this machine back; the first time counts.
    ///
    /// # Errors
    /// The machine has no such grant.
    pub async fn revoke_grant(
        &self,
        machine: MachineId,
        id: GrantId,
        event: NewEvent,
    ) -> Result<GrantRow, StoreError> {
        self.write("revoke a grant", move |tx| {
            let changed = tx
                .execute(
                    "UPDATE grants SET revoked_unix_ms = ?3 WHERE id = ?1 AND machine_id = ?2 AND revoked_unix_ms IS NULL",
                    params![id.as_str(), machine.as_str(), event.at_unix_ms],
                )
                .map_err(sql("revoke a grant"))?;
            if changed == 1 {
                events::insert(tx, &event)?;
            }
            let query = format!("SELECT {GRANT_COLUMNS} FROM grants WHERE id = ?1 AND machine_id = ?2");
            tx.query_row(&query, [id.as_str(), machine.as_str()], |row| Ok(decode(row)))
                .optional()
                .map_err(sql("revoke a grant"))?
                .transpose()?
                .ok_or_else(|| StoreError::Refused {
                    code: ErrorCode::GrantNotFound,
                    reason: format!("machine {machine} has no grant {id}"),
                })
        })
        .await
    }

    /// Grants that were taken back before their end.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn revoked_grants(&self, now_unix_ms: u64) -> Result<Vec<(GrantId, u64)>, StoreError> {
        self.read("read revoked grants", move |tx| {
            let operation = sql("read revoked grants");
            let mut statement = tx
                .prepare_cached(
                    "SELECT id, expires_unix_ms FROM grants WHERE revoked_unix_ms IS NOT NULL AND expires_unix_ms > ?1",
                )
                .map_err(&operation)?;
            let mut found = statement.query([now_unix_ms]).map_err(&operation)?;
            let mut revoked = Vec::new();
            while let Some(row) = found.next().map_err(&operation)? {
                revoked.push((parse(&get::<String>(row, "id")?, "id")?, get(row, "expires_unix_ms")?));
            }
            Ok(revoked)
        })
        .await
    }

    /// Add what was newly counted.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn count_grants(&self, newly: Vec<(GrantId, GrantUsage)>) -> Result<(), StoreError> {
        self.write("count the use of grants", move |tx| {
            let operation = sql("count the use of grants");
            let mut statement = tx
                .prepare_cached(
                    "UPDATE grants SET first_used_unix_ms = coalesce(first_used_unix_ms, ?2), \
                     last_used_unix_ms = max(coalesce(last_used_unix_ms, 0), coalesce(?3, last_used_unix_ms, 0)), \
                     http_requests = http_requests + ?4, websockets = websockets + ?5, \
                     to_guest_bytes = to_guest_bytes + ?6, from_guest_bytes = from_guest_bytes + ?7 WHERE id = ?1",
                )
                .map_err(&operation)?;
            for (id, usage) in &newly {
                statement
                    .execute(params![
                        id.as_str(),
                        usage.first_unix_ms,
                        usage.last_unix_ms,
                        usage.http_requests,
                        usage.websockets,
                        usage.to_guest_bytes,
                        usage.from_guest_bytes
                    ])
                    .map_err(&operation)?;
            }
            Ok(())
        })
        .await
    }
}

fn keys(connection: &Connection) -> Result<Vec<EdgeKeyRow>, StoreError> {
    let operation = sql("read edge keys");
    let mut statement = connection
        .prepare_cached("SELECT id, secret, created_unix_ms FROM edge_keys ORDER BY seq DESC")
        .map_err(&operation)?;
    let mut found = statement.query([]).map_err(&operation)?;
    let mut keys = Vec::new();
    while let Some(row) = found.next().map_err(&operation)? {
        keys.push(EdgeKeyRow {
            id: get(row, "id")?,
            secret: get(row, "secret")?,
            created_unix_ms: get(row, "created_unix_ms")?,
        });
    }
    Ok(keys)
}

fn insert_key(connection: &Connection, key: &EdgeKeyRow) -> Result<(), StoreError> {
    connection
        .execute(
            "INSERT INTO edge_keys (id, secret, created_unix_ms) VALUES (?1, ?2, ?3)",
            params![key.id, key.secret, key.created_unix_ms],
        )
        .map(drop)
        .map_err(sql("make an edge key"))
}

fn decode(row: &Row<'_>) -> Result<GrantRow, StoreError> {
    let transport: String = get(row, "transport")?;
    Ok(GrantRow {
        id: parse(&get::<String>(row, "id")?, "id")?,
        machine: parse(&get::<String>(row, "machine_id")?, "machine_id")?,
        port: get(row, "port")?,
        transport: [
            GrantTransport::Any,
            GrantTransport::Http,
            GrantTransport::Websocket,
        ]
        .into_iter()
        .find(|known| transport_text(*known) == transport)
        .ok_or(StoreError::BadRow {
            table: "grants",
            column: "transport",
            value: transport,
        })?,
        issued_unix_ms: get(row, "issued_unix_ms")?,
        expires_unix_ms: get(row, "expires_unix_ms")?,
        revoked_unix_ms: get(row, "revoked_unix_ms")?,
        usage: GrantUsage {
            first_unix_ms: get(row, "first_used_unix_ms")?,
            last_unix_ms: get::<Option<u64>>(row, "last_used_unix_ms")?.filter(|at| *at > 0),
            http_requests: get(row, "http_requests")?,
            websockets: get(row, "websockets")?,
            to_guest_bytes: get(row, "to_guest_bytes")?,
            from_guest_bytes: get(row, "from_guest_bytes")?,
        },
    })
}

fn transport_text(transport: GrantTransport) -> &'static str {
    match transport {
        GrantTransport::Any => "any",
        GrantTransport::Http => "http",
        GrantTransport::Websocket => "websocket",
    }
}
