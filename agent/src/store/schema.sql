CREATE TABLE machines (
    seq              INTEGER PRIMARY KEY AUTOINCREMENT,
    id               TEXT    NOT NULL UNIQUE,
    name             TEXT    UNIQUE,
    template         TEXT    NOT NULL,
    template_digest  TEXT    NOT NULL,
    vcpus            INTEGER NOT NULL,
    mem_mib          INTEGER NOT NULL,
    disk_mib         INTEGER NOT NULL,
    state            TEXT    NOT NULL CHECK (state IN ('creating', 'running', 'paused', 'refused', 'stopped', 'deleting')),
    generation       INTEGER NOT NULL DEFAULT 0,
    execution_id     TEXT,
    image_generation INTEGER NOT NULL DEFAULT 0,
    lease_seconds    INTEGER,
    lease_action     TEXT    CHECK (lease_action IN ('pause', 'destroy')),
    lease_mode       TEXT    CHECK (lease_mode IN ('absolute', 'sliding')),
    deadline_unix_ms INTEGER,
    lease_check_unix_ms INTEGER,
    wake_http        INTEGER NOT NULL,
    wake_ssh         INTEGER NOT NULL,
    wake_tcp         INTEGER NOT NULL,
    wake_api         INTEGER NOT NULL,
    metadata         TEXT    NOT NULL,
    pauses           INTEGER NOT NULL DEFAULT 0,
    wakes            INTEGER NOT NULL DEFAULT 0,
    last_error       TEXT,
    created_unix_ms  INTEGER NOT NULL,
    last_used_unix_ms INTEGER NOT NULL
, env TEXT NOT NULL DEFAULT '{}', cwd TEXT, last_execution_id TEXT, snapshot_id TEXT, hidden INTEGER NOT NULL DEFAULT 0, retention_seconds INTEGER, expires_unix_ms INTEGER, activity TEXT NOT NULL DEFAULT '{}') STRICT;

CREATE INDEX machines_state ON machines (state);

CREATE INDEX machines_lease_check ON machines (lease_check_unix_ms) WHERE lease_check_unix_ms IS NOT NULL;

CREATE INDEX machines_expires ON machines (expires_unix_ms) WHERE expires_unix_ms IS NOT NULL;

CREATE TABLE aliases (
    alias      TEXT PRIMARY KEY,
    machine_id TEXT NOT NULL REFERENCES machines (id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

CREATE INDEX aliases_machine ON aliases (machine_id);

CREATE TABLE executions (
    id               TEXT PRIMARY KEY,
    machine_id       TEXT    NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    started_by       TEXT    NOT NULL,
    started_unix_ms  INTEGER NOT NULL,
    ended_unix_ms    INTEGER,
    end_reason       TEXT
) STRICT, WITHOUT ROWID;

CREATE INDEX executions_machine ON executions (machine_id);

CREATE TABLE services (
    machine_id  TEXT    NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    name        TEXT    NOT NULL,
    port        INTEGER NOT NULL,
    kind        TEXT    NOT NULL CHECK (kind IN ('http', 'tcp')),
    listen_port INTEGER NOT NULL UNIQUE, auth TEXT NOT NULL DEFAULT 'none' CHECK (auth IN ('none', 'api_key', 'token')), wake_deadline_ms INTEGER,
    PRIMARY KEY (machine_id, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
    offset       INTEGER PRIMARY KEY AUTOINCREMENT,
    at_unix_ms   INTEGER NOT NULL,
    machine_id   TEXT    NOT NULL,
    execution_id TEXT,
    kind         TEXT    NOT NULL,
    actor        TEXT    NOT NULL,
    detail       TEXT    NOT NULL
) STRICT;

CREATE INDEX events_machine ON events (machine_id, offset);

CREATE TABLE idempotency_keys (
    key             TEXT PRIMARY KEY,
    body_digest     TEXT    NOT NULL,
    machine_id      TEXT    NOT NULL REFERENCES machines (id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_keys_machine ON idempotency_keys (machine_id);

CREATE TABLE edge_keys (
    seq             INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT    NOT NULL UNIQUE,
    secret          BLOB    NOT NULL,
    created_unix_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE grants (
    seq             INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT    NOT NULL UNIQUE,
    machine_id      TEXT    NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    port            INTEGER NOT NULL,
    transport       TEXT    NOT NULL CHECK (transport IN ('any', 'http', 'websocket')),
    issued_unix_ms  INTEGER NOT NULL,
    expires_unix_ms INTEGER NOT NULL,
    revoked_unix_ms INTEGER,
    first_used_unix_ms INTEGER,
    last_used_unix_ms  INTEGER,
    http_requests   INTEGER NOT NULL DEFAULT 0,
    websockets      INTEGER NOT NULL DEFAULT 0,
    to_guest_bytes  INTEGER NOT NULL DEFAULT 0,
    from_guest_bytes INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE INDEX grants_machine ON grants (machine_id, port, seq);

CREATE INDEX grants_revoked ON grants (expires_unix_ms) WHERE revoked_unix_ms IS NOT NULL;

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

CREATE TABLE machine_ssh_keys (
    machine_id      TEXT PRIMARY KEY REFERENCES machines (id) ON DELETE CASCADE,
    private_key     TEXT    NOT NULL,
    public_key      TEXT    NOT NULL,
    fingerprint     TEXT    NOT NULL,
    password        TEXT    NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE ssh_keys (
    seq             INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT    NOT NULL UNIQUE,
    name            TEXT    NOT NULL,
    public_key      TEXT    NOT NULL,
    fingerprint     TEXT    NOT NULL UNIQUE,
    created_unix_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE ssh_accesses (
    id              TEXT PRIMARY KEY,
    machine_id      TEXT    NOT NULL REFERENCES machines (id) ON DELETE CASCADE,
    user            TEXT    NOT NULL,
    expires_unix_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX ssh_accesses_machine ON ssh_accesses (machine_id);

CREATE INDEX ssh_accesses_expiry ON ssh_accesses (expires_unix_ms);

CREATE TABLE wake_filters (
    machine_id TEXT PRIMARY KEY REFERENCES machines (id) ON DELETE CASCADE,
    rules      TEXT NOT NULL
) STRICT, WITHOUT ROWID;
