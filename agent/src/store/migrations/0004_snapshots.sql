-- What a machine was made from, and whether users see it.
ALTER TABLE machines ADD COLUMN snapshot_id TEXT;
ALTER TABLE machines ADD COLUMN hidden INTEGER NOT NULL DEFAULT 0;

CREATE TABLE snapshots (
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT    NOT NULL UNIQUE,
    name             TEXT    UNIQUE,
    purpose          TEXT    NOT NULL CHECK (purpose IN ('user', 'fork', 'warm')),
    state            TEXT    NOT NULL CHECK (state IN ('creating', 'ready', 'deleting')),
    machine_id       TEXT    NOT NULL,
    execution_id     TEXT,
    digest           TEXT    UNIQUE,
    template         TEXT    NOT NULL,
    template_digest  TEXT    NOT NULL,
    vcpus            INTEGER NOT NULL,
    mem_mib          INTEGER NOT NULL,
    disk_mib         INTEGER NOT NULL,
    size_bytes       INTEGER NOT NULL DEFAULT 0,
    metadata         TEXT    NOT NULL,
    retention_seconds INTEGER,
    expires_unix_ms  INTEGER,
    created_unix_ms  INTEGER NOT NULL,
    last_used_unix_ms INTEGER NOT NULL
) STRICT;

CREATE INDEX snapshots_machine ON snapshots (machine_id);
CREATE INDEX snapshots_expires ON snapshots (expires_unix_ms) WHERE expires_unix_ms IS NOT NULL;

CREATE TABLE snapshot_keys (
    key             TEXT PRIMARY KEY,
    body_digest     TEXT    NOT NULL,
    snapshot_id     TEXT    NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

CREATE INDEX snapshot_keys_snapshot ON snapshot_keys (snapshot_id);
