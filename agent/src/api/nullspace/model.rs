//! The machine object, in full: every route that shows a machine shows this.

use super::dialect::{machine_id, pause_snapshot_id};
use super::time::iso;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use torpor_api::http::{Machine, MachineStatus};
use torpor_api::{Lease, LeaseAction};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// Metadata here is any JSON object, and the fleet's is texts: an object with other values is kept whole under this
/// key, beside its values as texts, by which lists are narrowed.
const WHOLE: &str = "nullspace.metadata";
/// The key of machines that were asked for as ephemeral. The fleet knows them by their lease only.
const EPHEMERAL: &str = "nullspace.ephemeral";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Creating,
    Running,
    Paused,
    Destroyed,
    Error,
}

impl Status {
    pub(super) fn of(machine: &Machine) -> Self {
        match machine.status {
            MachineStatus::Starting => Self::Creating,
            MachineStatus::Running | MachineStatus::Pausing => Self::Running,
            MachineStatus::Paused | MachineStatus::Waking => Self::Paused,
            // Shut down inside, it comes back by a resume as a paused one does.
            MachineStatus::Stopped if machine.last_error.is_none() => Self::Paused,
            MachineStatus::Stopped => Self::Error,
            MachineStatus::Deleting => Self::Destroyed,
        }
    }

    /// Which machines may be shown as this.
    pub(super) fn candidates(self) -> &'static [MachineStatus] {
        match self {
            Self::Creating => &[MachineStatus::Starting],
            Self::Running => &[MachineStatus::Running, MachineStatus::Pausing],
            Self::Paused => &[
                MachineStatus::Paused,
                MachineStatus::Waking,
                MachineStatus::Stopped,
            ],
            Self::Destroyed => &[MachineStatus::Deleting],
            Self::Error => &[MachineStatus::Stopped],
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        [
            Self::Creating,
            Self::Running,
            Self::Paused,
            Self::Destroyed,
            Self::Error,
        ]
        .into_iter()
        .find(|status| json!(status) == *text)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum TimeoutAction {
    Destroy,
    Hibernate,
}

impl From<LeaseAction> for TimeoutAction {
    fn from(action: LeaseAction) -> Self {
        match action {
            LeaseAction::Pause => Self::Hibernate,
            LeaseAction::Destroy => Self::Destroy,
        }
    }
}

impl From<TimeoutAction> for LeaseAction {
    fn from(action: TimeoutAction) -> Self {
        match action {
            TimeoutAction::Hibernate => Self::Pause,
            TimeoutAction::Destroy => Self::Destroy,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct Config {
    vcpus: u8,
    memory_mb: u32,
    disk_mb: u32,
}

/// What a machine's timeout is; the answer to setting one, too.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Timeout {
    timeout_ms: u64,
    timeout_action: TimeoutAction,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remaining_ms: Option<u64>,
}

impl From<&Lease> for Timeout {
    fn from(lease: &Lease) -> Self {
        let at = lease.deadline_unix_ms.map(iso);
        Self {
            timeout_ms: lease.policy.seconds.saturating_mul(1000),
            timeout_action: lease.policy.action.into(),
            timeout_at: at.clone(),
            expires_at: at,
            remaining_ms: lease.remaining_ms,
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MachineInfo)]
pub(super) struct Info {
    id: String,
    status: Status,
    config: Config,
    template: String,
    created_at: String,
    /// Of this execution.
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<String>,
    metadata: Value,
    ephemeral: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_action: Option<TimeoutAction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remaining_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cwd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot_id: Option<String>,
}

impl From<Machine> for Info {
    fn from(machine: Machine) -> Self {
        let status = Status::of(&machine);
        let timeout = machine.lease.as_ref().map(Timeout::from);
        let timeout = timeout.as_ref();
        let ends_at = timeout.and_then(|timeout| timeout.timeout_at.clone());
        Self {
            id: machine_id(&machine),
            status,
            config: Config {
                vcpus: machine.vcpus,
                memory_mb: machine.mem_mib,
                disk_mb: machine.disk_mib,
            },
            created_at: iso(machine.created_unix_ms),
            started_at: (status == Status::Running).then(|| iso(machine.since_unix_ms)),
            ephemeral: machine.metadata.contains_key(EPHEMERAL),
            timeout_ms: timeout.map(|timeout| timeout.timeout_ms),
            timeout_action: timeout.map(|timeout| timeout.timeout_action),
            timeout_at: ends_at.clone(),
            expires_at: ends_at,
            remaining_ms: timeout.and_then(|timeout| timeout.remaining_ms),
            snapshot_id: pause_snapshot_id(&machine).filter(|_| status == Status::Paused),
            metadata: shown_metadata(machine.metadata),
            template: machine.template,
            cwd: machine.cwd,
        }
    }
}

/// A machine, or those of its fields that were asked for.
pub(super) struct Shown(pub(super) Value);

impl Serialize for Shown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl PartialSchema for Shown {
    fn schema() -> RefOr<Schema> {
        match Info::schema() {
            RefOr::T(Schema::Object(mut info)) => {
                info.required.clear();
                info.into()
            }
            other => other,
        }
    }
}

impl ToSchema for Shown {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("PartialMachineInfo")
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Info::schemas(schemas);
    }
}

/// A pause as a snapshot. Nothing that the SDK does not know may be in it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SnapshotInfo {
    pub(super) id: String,
    pub(super) machine_id: String,
    pub(super) size_bytes: u64,
    pub(super) created_at: String,
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What is stored of a machine that never sleeps.
pub(super) fn mark_ephemeral(texts: &mut BTreeMap<String, String>) {
    texts.insert(EPHEMERAL.to_owned(), "true".to_owned());
}

/// The texts by which metadata is stored and found.
pub(super) fn stored_metadata(metadata: &Map<String, Value>) -> BTreeMap<String, String> {
    let mut texts: BTreeMap<String, String> = metadata
        .iter()
        .map(|(key, value)| (key.clone(), text_of(value)))
        .collect();
    if !metadata.values().all(Value::is_string) {
        texts.insert(WHOLE.to_owned(), json!(metadata).to_string());
    }
    texts
}

fn shown_metadata(mut texts: BTreeMap<String, String>) -> Value {
    texts.remove(EPHEMERAL);
    let whole = texts.remove(WHOLE);
    whole
        .and_then(|text| serde_json::from_str(&text).ok())
        .filter(Value::is_object)
        .unwrap_or_else(|| json!(texts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_of_any_shape_comes_back_as_it_was() {
        for text in [r#"{}"#, r#"{"a":"b"}"#, r#"{"a":1,"b":{"c":[null]},"d":"e"}"#] {
            let value: Value = serde_json::from_str(text).unwrap();
            let stored = stored_metadata(value.as_object().unwrap());
            assert_eq!(shown_metadata(stored), value);
        }
        let number: Value = serde_json::from_str(r#"{"a":1}"#).unwrap();
        assert_eq!(stored_metadata(number.as_object().unwrap())["a"], "1");
    }
}
