-- What commands of a machine run with unless they say otherwise, and the execution that was live last.
ALTER TABLE machines ADD COLUMN env TEXT NOT NULL DEFAULT '{}';
ALTER TABLE machines ADD COLUMN cwd TEXT;
ALTER TABLE machines ADD COLUMN last_execution_id TEXT;
UPDATE machines SET last_execution_id =
    (SELECT id FROM executions WHERE machine_id = machines.id ORDER BY started_unix_ms DESC LIMIT 1);
