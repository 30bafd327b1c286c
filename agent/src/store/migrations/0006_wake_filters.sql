CREATE TABLE wake_filters (
    machine_id TEXT PRIMARY KEY REFERENCES machines (id) ON DELETE CASCADE,
    rules      TEXT NOT NULL
) STRICT, WITHOUT ROWID;
