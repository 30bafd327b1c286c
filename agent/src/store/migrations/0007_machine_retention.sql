ALTER TABLE machines ADD COLUMN retention_seconds INTEGER;
ALTER TABLE machines ADD COLUMN expires_unix_ms INTEGER;

CREATE INDEX machines_expires ON machines (expires_unix_ms) WHERE expires_unix_ms IS NOT NULL;
