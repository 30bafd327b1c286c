ALTER TABLE services ADD COLUMN auth TEXT NOT NULL DEFAULT 'none' CHECK (auth IN ('none', 'api_key', 'token'));
ALTER TABLE services ADD COLUMN wake_deadline_ms INTEGER;

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
