//! Who may enter by SSH: keys and passwords of machines, registered keys, accesses by certificate.
//!
//! Private keys and passwords of machines stand here as they are, because their owner may ask for them again; the
//! file is root's.

use super::rows::{get, parse};
use super::{Store, StoreError, sql};
use rusqlite::{Connection, OptionalExtension, Row, params};
use torpor_api::http::{MachineSshKey, SshKey};
use torpor_api::{AccessId, MachineId, SshKeyId};

/// Most registered keys.
pub const MAX_SSH_KEYS: u64 = 1000;

/// What somebody shows at the door of a machine.
#[derive(Clone, PartialEq, Eq)]
pub enum SshProof {
    /// Fingerprint of a key that is theirs.
    Key(String),
    /// An access that a certificate names, for this user, now.
    Access {
        /// The access.
        id: String,
        /// User in the guest.
        user: String,
        /// Unix time in milliseconds.
        now_unix_ms: u64,
    },
}

impl Store {
    /// The machine's key; `new` becomes it if there is none, or if it is to be replaced.
    ///
    /// # Errors
    /// There is no such machine, or SQLite refuses.
    pub async fn machine_ssh_key(
        &self,
        machine: MachineId,
        new: MachineSshKey,
        replace: bool,
    ) -> Result<MachineSshKey, StoreError> {
        self.write("keep the SSH key of a machine", move |tx| {
            if let Some(key) = machine_key(tx, &machine)?
                && !replace
            {
                return Ok(key);
            }
            if super::rows::machine(tx, &machine)?.is_none() {
                return Err(StoreError::NoMachine {
                    id: machine.to_string(),
                });
            }
            tx.execute(
                "INSERT OR REPLACE INTO machine_ssh_keys (machine_id, private_key, public_key, fingerprint, password) \
                 VALUES (?1, ?2, ?3, ?4, ?5)",
                params![
                    machine.as_str(),
                    new.private_key,
                    new.public_key,
                    new.fingerprint,
                    new.password
                ],
            )
            .map_err(sql("keep the SSH key of a machine"))?;
            Ok(new)
        })
        .await
    }

    /// The machine's key, if it was ever asked for.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn find_machine_ssh_key(
        &self,
        machine: MachineId,
    ) -> Result<Option<MachineSshKey>, StoreError> {
        self.read("read the SSH key of a machine", move |tx| {
            machine_key(tx, &machine)
        })
        .await
    }

    /// Whether this opens the machine.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn ssh_proof_opens(&self, machine: MachineId, proof: SshProof) -> Result<bool, StoreError> {
        self.read("check an SSH login", move |tx| {
            let found = match &proof {
                SshProof::Key(fingerprint) => tx.query_row(
                    "SELECT EXISTS (SELECT 1 FROM machine_ssh_keys WHERE machine_id = ?1 AND fingerprint = ?2) \
                     OR EXISTS (SELECT 1 FROM ssh_keys WHERE fingerprint = ?2)",
                    params![machine.as_str(), fingerprint],
                    |row| row.get(0),
                ),
                SshProof::Access {
                    id,
                    user,
                    now_unix_ms,
                } => tx.query_row(
                    "SELECT EXISTS (SELECT 1 FROM ssh_accesses \
                     WHERE id = ?1 AND machine_id = ?2 AND user = ?3 AND expires_unix_ms > ?4)",
                    params![id, machine.as_str(), user, now_unix_ms],
                    |row| row.get(0),
                ),
            };
            found.map_err(sql("check an SSH login"))
        })
        .await
    }

    /// Write down an access, and forget those that have expired.
    ///
    /// # Errors
    /// There is no such machine, or SQLite refuses.
    pub async fn add_ssh_access(
        &self,
        id: AccessId,
        machine: MachineId,
        user: String,
        (now_unix_ms, expires_unix_ms): (u64, u64),
    ) -> Result<(), StoreError> {
        self.write("write down an SSH access", move |tx| {
            let operation = sql("write down an SSH access");
            if super::rows::machine(tx, &machine)?.is_none() {
                return Err(StoreError::NoMachine {
                    id: machine.to_string(),
                });
            }
            tx.execute(
                "DELETE FROM ssh_accesses WHERE expires_unix_ms <= ?1",
                [now_unix_ms],
            )
            .map_err(&operation)?;
            tx.execute(
                "INSERT INTO ssh_accesses (id, machine_id, user, expires_unix_ms) VALUES (?1, ?2, ?3, ?4)",
                params![id.as_str(), machine.as_str(), user, expires_unix_ms],
            )
            .map_err(&operation)?;
            Ok(())
        })
        .await
    }

    /// Register a key. The same key again answers what there is.
    ///
    /// # Errors
    /// There are too many, or SQLite refuses.
    pub async fn add_ssh_key(&self, key: SshKey) -> Result<SshKey, StoreError> {
        self.write("register an SSH key", move |tx| {
            let operation = sql("register an SSH key");
            if let Some(found) = find(tx, "fingerprint", &key.fingerprint)? {
                return Ok(found);
            }
            let count: u64 = tx
                .query_row("SELECT count(*) FROM ssh_keys", [], |row| row.get(0))
                .map_err(&operation)?;
            if count >= MAX_SSH_KEYS {
                return Err(StoreError::Refused {
                    code: torpor_api::ErrorCode::InvalidRequest,
                    reason: format!("{MAX_SSH_KEYS} keys are registered already"),
                });
            }
            tx.execute(
                "INSERT INTO ssh_keys (id, name, public_key, fingerprint, created_unix_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![key.id.as_str(), key.name, key.public_key, key.fingerprint, key.created_unix_ms],
            )
            .map_err(&operation)?;
            Ok(key)
        })
        .await
    }

    /// All registered keys, oldest first.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn ssh_keys(&self) -> Result<Vec<SshKey>, StoreError> {
        self.read("list SSH keys", |tx| {
            let operation = sql("list SSH keys");
            let mut statement = tx
                .prepare_cached("SELECT * FROM ssh_keys ORDER BY seq")
                .map_err(&operation)?;
            let mut found = statement.query([]).map_err(&operation)?;
            let mut keys = Vec::new();
            while let Some(row) = found.next().map_err(&operation)? {
                keys.push(key(row)?);
            }
            Ok(keys)
        })
        .await
    }

    /// A registered key.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn ssh_key(&self, id: SshKeyId) -> Result<Option<SshKey>, StoreError> {
        self.read("read an SSH key", move |tx| find(tx, "id", id.as_str()))
            .await
    }

    /// Rename a registered key; answers what it is then.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn rename_ssh_key(&self, id: SshKeyId, name: String) -> Result<Option<SshKey>, StoreError> {
        self.write("rename an SSH key", move |tx| {
            tx.execute(
                "UPDATE ssh_keys SET name = ?2 WHERE id = ?1",
                [id.as_str(), &name],
            )
            .map_err(sql("rename an SSH key"))?;
            find(tx, "id", id.as_str())
        })
        .await
    }

    /// Forget a registered key; whether there was one.
    ///
    /// # Errors
    /// SQLite refuses.
    pub async fn remove_ssh_key(&self, id: SshKeyId) -> Result<bool, StoreError> {
        self.write("remove an SSH key", move |tx| {
            let removed = tx
                .execute("DELETE FROM ssh_keys WHERE id = ?1", [id.as_str()])
                .map_err(sql("remove an SSH key"))?;
            Ok(removed > 0)
        })
        .await
    }
}

fn machine_key(connection: &Connection, machine: &MachineId) -> Result<Option<MachineSshKey>, StoreError> {
    connection
        .query_row(
            "SELECT private_key, public_key, fingerprint, password FROM machine_ssh_keys WHERE machine_id = ?1",
            [machine.as_str()],
            |row| {
                Ok(MachineSshKey {
                    private_key: row.get(0)?,
                    public_key: row.get(1)?,
                    fingerprint: row.get(2)?,
                    password: row.get(3)?,
                })
            },
        )
        .optional()
        .map_err(sql("read the SSH key of a machine"))
}

fn find(connection: &Connection, column: &'static str, value: &str) -> Result<Option<SshKey>, StoreError> {
    let operation = sql("read an SSH key");
    let mut statement = connection
        .prepare_cached(&format!("SELECT * FROM ssh_keys WHERE {column} = ?1"))
        .map_err(&operation)?;
    let mut found = statement.query([value]).map_err(&operation)?;
    found.next().map_err(&operation)?.map(key).transpose()
}

fn key(row: &Row<'_>) -> Result<SshKey, StoreError> {
    Ok(SshKey {
        id: parse(&get::<String>(row, "id")?, "id")?,
        name: get(row, "name")?,
        public_key: get(row, "public_key")?,
        fingerprint: get(row, "fingerprint")?,
        created_unix_ms: get(row, "created_unix_ms")?,
    })
}
