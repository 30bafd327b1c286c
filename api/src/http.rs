//! Bodies of the native HTTP API under `/v1`. Requests reject unknown fields.

mod edge;
mod inside;
mod pools;
mod ssh;
mod wake_filter;

pub use edge::*;
pub use inside::*;
pub use pools::*;
pub use ssh::*;
pub use wake_filter::*;

use crate::activity::ActivityPolicy;
use crate::ids::{ExecutionId, MachineId, MachineName, SnapshotId};
use crate::lease::{Lease, LeasePolicy};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

mod endpoints;

pub use endpoints::{Endpoints, SshEndpoint};
mod snapshots;

pub use snapshots::{
    CreateSnapshot, ForkMachine, Forked, PatchSnapshot, Retention, Snapshot, SnapshotList, SnapshotStatus,
};

/// What a user sees of a machine's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum MachineStatus {
    /// Booting for the first time, or again from its disk.
    Starting,
    /// vCPUs run.
    Running,
    /// Frozen or being written; a request gets it running at once.
    Pausing,
    /// Asleep with its memory: no process, no RAM.
    Paused,
    /// A restore is under way.
    Waking,
    /// Off, with its disk and without memory: shut down inside, or its memory was lost or refused.
    Stopped,
    /// Being deleted.
    Deleting,
}

/// Which traffic may wake a paused machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct WakePolicy {
    /// HTTP and WebSocket requests.
    pub http: bool,
    /// SSH logins.
    pub ssh: bool,
    /// Raw TCP connections.
    pub tcp: bool,
    /// Exec, files and other API calls that need the guest.
    pub api: bool,
}

impl Default for WakePolicy {
    fn default() -> Self {
        Self {
            http: true,
            ssh: true,
            tcp: true,
            api: true,
        }
    }
}

impl WakePolicy {
    /// Nothing but an explicit resume wakes.
    pub const OFF: Self = Self {
        http: false,
        ssh: false,
        tcp: false,
        api: false,
    };
}

/// What a service speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ServiceKind {
    /// HTTP/1.1, WebSocket and whatever upgrades from it.
    #[default]
    Http,
    /// Bytes.
    Tcp,
}

/// `POST /v1/machines/{id}/services`, and part of a create.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Unique within the machine; `port-<port>` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<MachineName>,
    /// Port in the guest, 1 to 65535.
    pub port: u16,
    /// What it speaks.
    #[serde(default)]
    pub kind: ServiceKind,
    /// What a request must show; HTTP only.
    #[serde(default)]
    pub auth: ServiceAuth,
    /// Longest wait of a request for a wake in milliseconds; the host's own if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake_deadline_ms: Option<u64>,
}

/// A service as it is exposed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Service {
    /// Unique within the machine.
    pub name: String,
    /// Port in the guest.
    pub port: u16,
    /// What it speaks.
    pub kind: ServiceKind,
    /// What a request must show.
    #[serde(default)]
    pub auth: ServiceAuth,
    /// Longest wait of a request for a wake in milliseconds, if it is not the host's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake_deadline_ms: Option<u64>,
    /// Port on the proxy's address; kept for as long as the service is exposed.
    pub listen_port: u16,
    /// Where clients go, for example `http://127.0.0.1:20001`.
    pub url: String,
}

/// `POST /v1/machines`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct CreateMachine {
    /// Unique label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<MachineName>,
    /// Template to start from.
    #[serde(default = "default_template")]
    pub template: String,
    /// ID or name of a snapshot to go on from, memory and all. Its shape and template are the machine's; a field that
    /// says otherwise is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Number of vCPUs.
    #[serde(default = "default_vcpus")]
    pub vcpus: u8,
    /// Guest memory in MiB.
    #[serde(default = "default_mem_mib")]
    pub mem_mib: u32,
    /// Size of the disk in MiB; the template's own size if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u32>,
    /// Lease; without one the machine stays awake until it is told otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeasePolicy>,
    /// What keeps a sliding lease from ending, and the least time awake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activity: Option<ActivityPolicy>,
    /// Wake switches; all on if not given and the lease's action is not `destroy`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake: Option<WakePolicy>,
    /// Delete the machine when it was not awake for so long; without it a machine is kept until it is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention_seconds: Option<u64>,
    /// Services to expose from the start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<ServiceSpec>,
    /// Free key/value pairs of the user.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Environment of its commands, below what a command sets itself.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory of commands that name none; `/workspace` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
}

impl Default for CreateMachine {
    fn default() -> Self {
        Self {
            name: None,
            template: default_template(),
            snapshot: None,
            vcpus: default_vcpus(),
            mem_mib: default_mem_mib(),
            disk_mib: None,
            lease: None,
            activity: None,
            wake: None,
            retention_seconds: None,
            services: Vec::new(),
            metadata: BTreeMap::new(),
            env: BTreeMap::new(),
            cwd: None,
        }
    }
}

fn default_template() -> String {
    "base".to_owned()
}
fn default_vcpus() -> u8 {
    1
}
fn default_mem_mib() -> u32 {
    256
}

/// A machine, as every read and every change answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Machine {
    /// Permanent identity.
    pub id: MachineId,
    /// Unique label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<MachineName>,
    /// What it is doing.
    pub status: MachineStatus,
    /// The live execution.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<ExecutionId>,
    /// The execution that is live, or was live last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_execution_id: Option<ExecutionId>,
    /// Template it was made from.
    pub template: String,
    /// Snapshot that it went on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<SnapshotId>,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub mem_mib: u32,
    /// Size of the disk in MiB.
    pub disk_mib: u32,
    /// Unix time of the create call in milliseconds.
    pub created_unix_ms: u64,
    /// Unix time in milliseconds of its last start, wake or pause: how long it has been as it is.
    pub since_unix_ms: u64,
    /// The lease, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// How long it is kept while it is not awake; absent if until it is deleted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<MachineRetention>,
    /// What keeps a sliding lease from ending, and the least time awake.
    #[serde(default)]
    pub activity: ActivityPolicy,
    /// Wake switches.
    pub wake: WakePolicy,
    /// Exposed services.
    pub services: Vec<Service>,
    /// Free key/value pairs of the user.
    pub metadata: BTreeMap<String, String>,
    /// Environment of its commands, below what a command sets itself.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory of commands that name none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Why the last operation failed, until the next one succeeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<LastError>,
    /// Number of completed pauses.
    pub pauses: u64,
    /// Number of completed wakes.
    pub wakes: u64,
}

/// `PUT /v1/machines/{id}/metadata`: all of it is replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SetMetadata {
    /// Free key/value pairs of the user.
    pub metadata: BTreeMap<String, String>,
}

/// The failure that a machine remembers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct LastError {
    /// Stable code.
    pub code: crate::ErrorCode,
    /// What failed, on what.
    pub message: String,
    /// Unix time in milliseconds.
    pub at_unix_ms: u64,
}

/// `GET /v1/machines`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct MachineList {
    /// Machines, oldest first.
    pub machines: Vec<Machine>,
    /// Pass as `after` to get the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<MachineId>,
}

/// Where a resume takes the machine from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ResumeFrom {
    /// Its memory; refused if there is none or it is damaged.
    #[default]
    Memory,
    /// Its disk: a boot, which gives up the memory if there is one.
    Disk,
}

/// `POST /v1/machines/{id}/resume`; the body may be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ResumeMachine {
    /// Memory or disk.
    pub from: ResumeFrom,
}

/// `PUT /v1/machines/{id}/lease`; `null` takes the lease away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SetLease {
    /// The new policy, counted from now.
    pub lease: Option<LeasePolicy>,
}

/// How long a machine is kept that is not awake. The policy is the machine's own and survives every resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct MachineRetention {
    /// Counted from its last use: from when it fell asleep, or from the call that set this.
    pub seconds: u64,
    /// Unix time in milliseconds at which it is deleted; absent while it is awake.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_unix_ms: Option<u64>,
    /// Milliseconds until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining_ms: Option<u64>,
}

/// `PUT /v1/machines/{id}/retention`; `null` keeps the machine until it is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SetRetention {
    /// Counted from now for a machine that is not awake.
    pub retention_seconds: Option<u64>,
}

/// `PATCH /v1/machines/{id}/wake`: only the switches given change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct PatchWake {
    /// HTTP and WebSocket requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<bool>,
    /// SSH logins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh: Option<bool>,
    /// Raw TCP connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<bool>,
    /// API calls that need the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<bool>,
}

/// `POST /v1/machines/{id}/exec`. Give `argv` or `shell`, not both.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ExecRequest {
    /// Program and arguments, run without a shell.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub argv: Vec<String>,
    /// A command line for `/bin/sh -c`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    /// Added to the guest's default environment.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/workspace` if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User name in the guest; `root` if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Text for standard input, which is then closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Kill the whole group after so many milliseconds; 30 s if not given, no limit for background.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Answer with the PID at once and let the process run on.
    pub background: bool,
}

/// Answer to an exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ExecResult {
    /// PID in the guest.
    pub pid: u32,
    /// Exit code, or 128 + signal; absent for a background process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Standard output, invalid UTF-8 replaced; at most [`crate::limits::MAX_EXEC_OUTPUT`] bytes.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// Output past the limit was dropped.
    pub truncated: bool,
}

/// A template on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Template {
    /// Its name.
    pub name: String,
    /// Size of its root disk in MiB.
    pub disk_mib: u32,
    /// What it holds, for people.
    pub description: String,
}

/// `GET /v1/templates`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct TemplateList {
    /// By name.
    pub templates: Vec<Template>,
}

/// One row of the events table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Event {
    /// Position in the host's one sequence.
    pub offset: u64,
    /// Unix time in milliseconds.
    pub at_unix_ms: u64,
    /// The machine.
    pub machine_id: MachineId,
    /// The execution, where one was live.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub execution_id: Option<ExecutionId>,
    /// What happened, for example `machine.woken`.
    pub kind: String,
    /// Who caused it: `api`, `lease`, `http`, `tcp`, `ssh`, `guest`, `recovery`.
    pub actor: String,
    /// Details by kind: cause, stages in microseconds, bytes, errors.
    pub detail: serde_json::Value,
}

/// `GET /v1/machines/{id}/events` and `GET /v1/events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct EventList {
    /// In order.
    pub events: Vec<Event>,
    /// Pass as `after` to go on.
    pub next_offset: u64,
}

/// `GET /v1/healthz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Health {
    /// Always `ok` when answered.
    pub status: String,
    /// Version of torpord.
    pub version: String,
    /// Machines by status.
    pub machines: BTreeMap<String, u64>,
    /// What is kept ready.
    #[serde(default)]
    pub pools: Pools,
}
