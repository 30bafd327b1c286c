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
