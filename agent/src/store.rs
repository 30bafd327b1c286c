//! All SQL of torpord: what is committed of every machine, and what happened to it.
//!
//! Two threads, each with a connection and a bounded queue: one writes, in the order in which it was asked, and
//! one reads. [`Store::open`] is the only place with pragmas. A transition of a machine is compare-and-set on the
//! row's generation, so a driver that was overtaken cannot write. Schema changes are forward-only migrations;
//! a test compares their sum with `schema.sql`.
//!
//! A hundred thousand paused rows cost disk only: nothing is loaded at open but what was awake, and deadlines are
//! found by an index.
//!
//! Not its job: what a transition means. It stores what the lifecycle decided.

mod edge;
mod events;
mod filters;
mod leases;
mod machines;
mod rows;
mod services;
mod snapshots;
mod ssh;
mod transition;

pub use edge::{EdgeKeyRow, GrantRow, GrantUsage};
pub use events::{EventFilter, NewEvent};
pub use leases::DueLease;
pub use machines::{Created, Idempotency, MachineFilter, NewMachine};
pub use rows::{MachineRow, ServiceRow};
pub use services::{SERVICE_PORTS, ServiceRoute};
pub use snapshots::{NewSnapshot, SnapshotCreated, SnapshotFilter, SnapshotPurpose, SnapshotRow};
pub use ssh::{MAX_SSH_KEYS, SshProof};
pub use transition::{LeaseChange, Transition};

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};
use rusqlite_migration::{M, Migrations};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use torpor_api::{ErrorCode, MachineId};

const QUEUE_LEN: usize = 256;
const MIGRATIONS: &[M<'static>] = &[
    M::up(include_str!("store/migrations/0001_machines.sql")),
    M::up(include_str!("store/migrations/0002_machine_defaults.sql")),
    M::up(include_str!("store/migrations/0003_edge.sql")),
    M::up(include_str!("store/migrations/0004_snapshots.sql")),
    M::up(include_str!("store/migrations/0005_ssh.sql")),
    M::up(include_str!("store/migrations/0006_wake_filters.sql")),
    M::up(include_str!("store/migrations/0007_machine_retention.sql")),
    M::up(include_str!("store/migrations/0008_activity.sql")),
];

/// Why the store could not.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened or brought to this version's schema.
    #[error("cannot open the store {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// SQLite refused.
    #[error("cannot {operation} in the store")]
    Sql {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: rusqlite::Error,
    },
    /// A row holds what this version never writes.
    #[error("row of {table} holds {column}={value:?}")]
    BadRow {
        /// Table.
        table: &'static str,
        /// Column.
        column: &'static str,
        /// Its value.
        value: String,
    },
    /// Another machine has the name.
    #[error("the name {name} is taken by another machine")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The machine has a service of this name.
    #[error("the machine already exposes a service {name} with another port or kind")]
    ServiceTaken {
        /// The service.
        name: String,
    },
    /// The machine has as many services as it may have.
    #[error("the machine already exposes {limit} services")]
    TooManyServices {
        /// The bound.
        limit: usize,
    },
    /// Every port of the range is taken.
    #[error("all listen ports are taken")]
    NoListenPort,
    /// No machine has this ID.
    #[error("no machine {id}")]
    NoMachine {
        /// The ID.
        id: String,
    },
    /// No snapshot has this ID.
    #[error("no snapshot {id}")]
    NoSnapshot {
        /// The ID.
        id: String,
    },
    /// The lease or retention that wanted this transition was moved meanwhile.
    #[error("the lease or retention of {id} was moved meanwhile")]
    LeaseMoved {
        /// The machine.
        id: MachineId,
    },
    /// The row is not of the generation that the transition began with.
    #[error("the row of {id} is no longer of generation {generation}")]
    Superseded {
        /// The machine.
        id: MachineId,
        /// The generation that was expected.
        generation: u64,
    },
    /// What came of a change is not allowed; nothing was changed.
    #[error("{reason}")]
    Refused {
        /// Stable code.
        code: ErrorCode,
        /// Why not.
        reason: String,
    },
    /// The Idempotency-Key was used with another body.
    #[error("the Idempotency-Key was used before with another body")]
    KeyReused,
    /// The store's thread is gone, because torpord is ending.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// What the caller of the API gets to see.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Sql { source, .. } if is_disk_full(source) => ErrorCode::DiskFull,
            Self::NameTaken { .. } | Self::ServiceTaken { .. } => ErrorCode::NameConflict,
            Self::TooManyServices { .. } => ErrorCode::InvalidRequest,
            Self::KeyReused => ErrorCode::IdempotencyConflict,
            Self::Refused { code, .. } => *code,
            Self::NoListenPort => ErrorCode::CapacityExceeded,
            Self::NoMachine { .. } => ErrorCode::MachineNotFound,
            Self::NoSnapshot { .. } => ErrorCode::SnapshotNotFound,
            Self::LeaseMoved { .. } => ErrorCode::TransitionInProgress,
            Self::Open { .. }
            | Self::Sql { .. }
            | Self::BadRow { .. }
            | Self::Superseded { .. }
            | Self::Closed => ErrorCode::Internal,
        }
    }
}

fn is_disk_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
}

fn sql(operation: &'static str) -> impl Fn(rusqlite::Error) -> StoreError {
    move |source| StoreError::Sql { operation, source }
}

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// The store; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    writer: mpsc::Sender<Job>,
    reader: mpsc::Sender<Job>,
    /// Number of transactions so far.
    written: Arc<watch::Sender<u64>>,
}

impl Store {
    /// Open the file at `path`, made if it is missing, and bring it to this version's schema.
    ///
    /// # Errors
    /// The file is not a store, is of a newer version, or cannot be read and written.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| StoreError::Open {
            path: path.to_owned(),
            source,
        };
        let mut writer = Connection::open(path).map_err(|error| failed(error.into()))?;
        set_pragmas(&writer).map_err(|error| failed(error.into()))?;
        Migrations::from_slice(MIGRATIONS)
            .to_latest(&mut writer)
            .map_err(|error| failed(error.into()))?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let reader = Connection::open_with_flags(path, flags).map_err(|error| failed(error.into()))?;
        reader
            .busy_timeout(Duration::from_secs(5))
            .map_err(|error| failed(error.into()))?;
        Ok(Self {
            writer: serve("store-write", writer).map_err(|error| failed(error.into()))?,
            reader: serve("store-read", reader).map_err(|error| failed(error.into()))?,
            written: Arc::default(),
        })
    }

    /// Run in one transaction, committed durably before this answers.
    async fn write<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let written = Arc::clone(&self.written);
        submit(&self.writer, move |connection| {
            let transaction = connection
                .transaction_with_behavior(TransactionBehavior::Immediate)
                .map_err(sql(operation))?;
            let value = work(&transaction)?;
            transaction.commit().map_err(sql(operation))?;
            written.send_modify(|n| *n += 1);
            Ok(value)
        })
        .await
    }

    /// Tells whenever there may be new events: after every transaction.
    #[must_use]
    pub fn event_changes(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }

    /// Read from one snapshot of the database.
    async fn read<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        submit(&self.reader, move |connection| {
            let transaction = connection.transaction().map_err(sql(operation))?;
            work(&transaction)
        })
        .await
    }
}

async fn submit<T: Send + 'static>(
    queue: &mpsc::Sender<Job>,
    work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let (reply, answer) = oneshot::channel();
    let job: Job = Box::new(move |connection| {
        // Nobody may be waiting any more; what was asked for is done all the same.
        let _ = reply.send(work(connection));
    });
    queue.send(job).await.map_err(|_| StoreError::Closed)?;
    answer.await.map_err(|_| StoreError::Closed)?
}

fn serve(name: &str, mut connection: Connection) -> std::io::Result<mpsc::Sender<Job>> {
    let (queue, mut jobs) = mpsc::channel::<Job>(QUEUE_LEN);
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        while let Some(job) = jobs.blocking_recv() {
            job(&mut connection);
        }
    })?;
    Ok(queue)
}

fn set_pragmas(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.busy_timeout(Duration::from_secs(5))
}

#[cfg(test)]
mod tests;
