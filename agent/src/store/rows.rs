//! Rows as domain types, each value checked on the way in: the file may be older, newer or damaged.

use super::{StoreError, sql};
use crate::machine::hypervisor::MachineSpec;
use crate::machine::state::Committed;
use rusqlite::{Connection, OptionalExtension, Row, params};
use std::collections::BTreeMap;
use std::str::FromStr;
use torpor_api::activity::ActivityPolicy;
use torpor_api::http::{LastError, ServiceAuth, ServiceKind, WakePolicy};
use torpor_api::{ExecutionId, LeaseAction, LeaseMode, LeasePolicy, MachineId, MachineName, SnapshotId};

/// What is committed of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineRow {
    /// What must be known to run it.
    pub spec: MachineSpec,
    /// Unique label.
    pub name: Option<MachineName>,
    /// Its committed state.
    pub committed: Committed,
    /// Number of transitions so far; the next one must name it.
    pub generation: u64,
    /// The live execution, as far as it is committed.
    pub execution: Option<ExecutionId>,
    /// The execution that is live, or was live last.
    pub last_execution: Option<ExecutionId>,
    /// Generation of its hibernation image; 0 before the first pause.
    pub image_generation: u64,
    /// Lease policy.
    pub lease: Option<LeasePolicy>,
    /// When the lease runs out; absent while the machine is asleep.
    pub deadline_unix_ms: Option<u64>,
    /// What counts as use of it.
    pub activity: ActivityPolicy,
    /// How long it is kept while it is not awake, if not until it is deleted.
    pub retention_seconds: Option<u64>,
    /// When that ends; absent while it is awake.
    pub expires_unix_ms: Option<u64>,
    /// Wake switches.
    pub wake: WakePolicy,
    /// Free key/value pairs of the user.
    pub metadata: BTreeMap<String, String>,
    /// Environment of its commands, below what a command sets itself.
    pub env: BTreeMap<String, String>,
    /// Working directory of commands that name none.
    pub cwd: Option<String>,
    /// The snapshot that it was made from.
    pub snapshot: Option<SnapshotId>,
    /// Exposed services, by name.
    pub services: Vec<ServiceRow>,
    /// Number of completed pauses.
    pub pauses: u64,
    /// Number of completed wakes.
    pub wakes: u64,
    /// Why the last operation failed.
    pub last_error: Option<LastError>,
    /// When it was created.
    pub created_unix_ms: u64,
    /// When it last went to sleep, woke or started.
    pub last_used_unix_ms: u64,
}

/// An exposed service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRow {
    /// Unique within the machine.
    pub name: String,
    /// Port in the guest.
    pub port: u16,
    /// What it speaks.
    pub kind: ServiceKind,
    /// What a request must show.
    pub auth: ServiceAuth,
    /// Longest wait of a request for a wake in milliseconds, if it is not the host's own.
    pub wake_deadline_ms: Option<u64>,
    /// Port of the proxy.
    pub listen_port: u16,
}

pub(super) const MACHINE_COLUMNS: &str = "id, name, template, template_digest, vcpus, mem_mib, disk_mib, state, \
     generation, execution_id, image_generation, lease_seconds, lease_action, lease_mode, deadline_unix_ms, \
     wake_http, wake_ssh, wake_tcp, wake_api, metadata, pauses, wakes, last_error, created_unix_ms, last_used_unix_ms, \
     env, cwd, last_execution_id, snapshot_id, retention_seconds, expires_unix_ms, activity";

/// The machine's row with its services.
pub(super) fn machine(connection: &Connection, id: &MachineId) -> Result<Option<MachineRow>, StoreError> {
    let query = format!("SELECT {MACHINE_COLUMNS} FROM machines WHERE id = ?1");
    let mut statement = connection.prepare_cached(&query).map_err(sql("read a machine"))?;
    let row = statement
        .query_row([id.as_str()], |row| Ok(decode_machine(row)))
        .optional()
        .map_err(sql("read a machine"))?
        .transpose()?;
    row.map(|row| with_services(connection, row)).transpose()
}

pub(super) fn with_services(connection: &Connection, mut row: MachineRow) -> Result<MachineRow, StoreError> {
    let operation = sql("read services");
    let mut statement = connection
        .prepare_cached(
            "SELECT name, port, kind, auth, wake_deadline_ms, listen_port FROM services WHERE machine_id = ?1 ORDER BY name",
        )
        .map_err(&operation)?;
    let mut found = statement
        .query(params![row.spec.id.as_str()])
        .map_err(&operation)?;
    while let Some(service) = found.next().map_err(&operation)? {
        row.services.push(decode_service(service)?);
    }
    Ok(row)
}

pub(super) fn decode_service(row: &Row<'_>) -> Result<ServiceRow, StoreError> {
    Ok(ServiceRow {
        name: get(row, "name")?,
        port: get(row, "port")?,
        kind: service_kind(&get::<String>(row, "kind")?)?,
        auth: service_auth(&get::<String>(row, "auth")?)?,
        wake_deadline_ms: get(row, "wake_deadline_ms")?,
        listen_port: get(row, "listen_port")?,
    })
}

pub(super) fn decode_machine(row: &Row<'_>) -> Result<MachineRow, StoreError> {
    let state: String = get(row, "state")?;
    let committed = Committed::ALL
        .into_iter()
        .find(|committed| committed.as_str() == state)
        .ok_or_else(|| bad("machines", "state", &state))?;
    Ok(MachineRow {
        spec: MachineSpec {
            id: parse(&get::<String>(row, "id")?, "id")?,
            template: get(row, "template")?,
            template_digest: get(row, "template_digest")?,
            vcpus: get(row, "vcpus")?,
            mem_mib: get(row, "mem_mib")?,
            disk_mib: get(row, "disk_mib")?,
        },
        name: parse_optional(get(row, "name")?, "name")?,
        committed,
        generation: get(row, "generation")?,
        execution: parse_optional(get(row, "execution_id")?, "execution_id")?,
        last_execution: parse_optional(get(row, "last_execution_id")?, "last_execution_id")?,
        image_generation: get(row, "image_generation")?,
        lease: decode_lease(row)?,
        deadline_unix_ms: get(row, "deadline_unix_ms")?,
        activity: decode_json(&get::<String>(row, "activity")?, "activity")?,
        retention_seconds: get(row, "retention_seconds")?,
        expires_unix_ms: get(row, "expires_unix_ms")?,
        wake: WakePolicy {
            http: get(row, "wake_http")?,
            ssh: get(row, "wake_ssh")?,
            tcp: get(row, "wake_tcp")?,
            api: get(row, "wake_api")?,
        },
        metadata: decode_json(&get::<String>(row, "metadata")?, "metadata")?,
        env: decode_json(&get::<String>(row, "env")?, "env")?,
        cwd: get(row, "cwd")?,
        snapshot: parse_optional(get(row, "snapshot_id")?, "snapshot_id")?,
        services: Vec::new(),
        pauses: get(row, "pauses")?,
        wakes: get(row, "wakes")?,
        last_error: get::<Option<String>>(row, "last_error")?
            .map(|text| decode_json(&text, "last_error"))
            .transpose()?,
        created_unix_ms: get(row, "created_unix_ms")?,
        last_used_unix_ms: get(row, "last_used_unix_ms")?,
    })
}

fn decode_lease(row: &Row<'_>) -> Result<Option<LeasePolicy>, StoreError> {
    let Some(seconds) = get::<Option<u64>>(row, "lease_seconds")? else {
        return Ok(None);
    };
    let action: String = get::<Option<String>>(row, "lease_action")?.unwrap_or_default();
    let mode: String = get::<Option<String>>(row, "lease_mode")?.unwrap_or_default();
    Ok(Some(LeasePolicy {
        seconds,
        action: lease_action(&action)?,
        mode: lease_mode(&mode)?,
    }))
}

pub(super) fn lease_action(text: &str) -> Result<LeaseAction, StoreError> {
    [LeaseAction::Pause, LeaseAction::Destroy]
        .into_iter()
        .find(|action| lease_action_text(*action) == text)
        .ok_or_else(|| bad("machines", "lease_action", text))
}

pub(super) fn lease_mode(text: &str) -> Result<LeaseMode, StoreError> {
    [LeaseMode::Absolute, LeaseMode::Sliding]
        .into_iter()
        .find(|mode| lease_mode_text(*mode) == text)
        .ok_or_else(|| bad("machines", "lease_mode", text))
}

pub(super) fn lease_action_text(action: LeaseAction) -> &'static str {
    match action {
        LeaseAction::Pause => "pause",
        LeaseAction::Destroy => "destroy",
    }
}

pub(super) fn lease_mode_text(mode: LeaseMode) -> &'static str {
    match mode {
        LeaseMode::Absolute => "absolute",
        LeaseMode::Sliding => "sliding",
    }
}

pub(super) fn service_kind_text(kind: ServiceKind) -> &'static str {
    match kind {
        ServiceKind::Http => "http",
        ServiceKind::Tcp => "tcp",
    }
}

pub(super) fn service_kind(text: &str) -> Result<ServiceKind, StoreError> {
    [ServiceKind::Http, ServiceKind::Tcp]
        .into_iter()
        .find(|kind| service_kind_text(*kind) == text)
        .ok_or_else(|| bad("services", "kind", text))
}

pub(super) fn service_auth_text(auth: ServiceAuth) -> &'static str {
    match auth {
        ServiceAuth::None => "none",
        ServiceAuth::ApiKey => "api_key",
        ServiceAuth::Token => "token",
    }
}

pub(super) fn service_auth(text: &str) -> Result<ServiceAuth, StoreError> {
    [ServiceAuth::None, ServiceAuth::ApiKey, ServiceAuth::Token]
        .into_iter()
        .find(|auth| service_auth_text(*auth) == text)
        .ok_or_else(|| bad("services", "auth", text))
}

pub(super) fn get<T: rusqlite::types::FromSql>(row: &Row<'_>, column: &'static str) -> Result<T, StoreError> {
    row.get(column).map_err(sql("decode a row"))
}

pub(super) fn parse<T: FromStr>(text: &str, column: &'static str) -> Result<T, StoreError> {
    text.parse().map_err(|_| bad("machines", column, text))
}

pub(super) fn parse_optional<T: FromStr>(
    text: Option<String>,
    column: &'static str,
) -> Result<Option<T>, StoreError> {
    text.map(|text| parse(&text, column)).transpose()
}

pub(super) fn decode_json<T: serde::de::DeserializeOwned>(
    text: &str,
    column: &'static str,
) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|_| bad("machines", column, text))
}

fn bad(table: &'static str, column: &'static str, value: &str) -> StoreError {
    StoreError::BadRow {
        table,
        column,
        value: value.chars().take(64).collect(),
    }
}
