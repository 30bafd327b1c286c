//! Processes, files and figures of a machine; why it is awake or asleep.

use super::{Event, MachineStatus};
use crate::guest::{FileAttributes, FileEntry, HoldState, ProcessEntry, WindowSize};
use crate::ids::MachineId;
use crate::lease::Lease;
use serde::{Deserialize, Serialize};

/// `GET /v1/machines/{id}/processes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ProcessList {
    /// Oldest first: what runs, and what ended last.
    pub processes: Vec<ProcessEntry>,
}

/// `GET /v1/machines/{id}/processes/{pid}/logs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Logs {
    /// Standard output, invalid UTF-8 replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    /// Both, in the order in which they were read.
    pub output: String,
    /// Offset of the first byte, counted from the process's start.
    pub begin: u64,
    /// Offset after the last byte; pass as `after` to get what comes next.
    pub end: u64,
    /// Exit code, once the process has ended and everything it wrote is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// It was killed because its time was up.
    pub timed_out: bool,
}

/// `POST /v1/machines/{id}/processes/{pid}/stdin`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct WriteStdin {
    /// Text for standard input.
    pub data: String,
    /// Then end it.
    pub close: bool,
}

/// `POST /v1/machines/{id}/processes/{pid}/kill`; the body may be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct KillProcess {
    /// Signal number for the whole group.
    pub signal: i32,
}

impl Default for KillProcess {
    fn default() -> Self {
        Self { signal: 9 }
    }
}

/// First message on `GET /v1/machines/{id}/exec/stream` over WebSocket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum StreamOpen {
    /// Run a command.
    Start {
        /// The command; its `stdin` is fed before what the client sends.
        command: super::ExecRequest,
        /// Under a terminal of this size.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tty: Option<WindowSize>,
        /// Take binary messages as standard input.
        #[serde(default)]
        stdin: bool,
    },
    /// Join a process that was started before.
    Attach {
        /// PID.
        pid: u32,
        /// Tells processes apart that had the same PID.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        serial: Option<u64>,
        /// Number of bytes of output that are known already.
        #[serde(default)]
        offset: u64,
        /// Take binary messages as standard input, from this client alone.
        #[serde(default)]
        stdin: bool,
    },
}

/// Later text messages of a client; binary messages are standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum StreamOrder {
    /// No more standard input.
    StdinEnd,
    /// The terminal has another size.
    Resize {
        /// Lines.
        rows: u16,
        /// Columns.
        cols: u16,
    },
    /// To the whole group.
    Signal {
        /// Number.
        signal: u32,
    },
}

/// Text messages of the server. Output comes in binary messages: 1 for standard output or 2 for standard error in
/// the first byte, then the bytes. Server-sent events carry the same, with output as `stdout` and `stderr`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamEvent {
    /// The first one.
    Started {
        /// PID.
        pid: u32,
        /// Tells processes apart that had the same PID.
        serial: u64,
    },
    /// Standard output (server-sent events only).
    Stdout {
        /// Bytes, base64.
        data_base64: String,
    },
    /// Standard error (server-sent events only).
    Stderr {
        /// Bytes, base64.
        data_base64: String,
    },
    /// So many bytes of output are no longer kept.
    Lost {
        /// Bytes.
        bytes: u64,
    },
    /// It ended; the last one.
    Exit {
        /// Exit code, or 128 + signal.
        exit_code: i32,
        /// It was killed because its time was up.
        timed_out: bool,
    },
    /// It is lost, or never began; the last one.
    Error {
        /// Why.
        error: crate::ApiError,
    },
}

/// What is at a path: `POST /v1/machines/{id}/files/stat`, `…/exists`, `…/mkdir`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct FilePath {
    /// Absolute path.
    pub path: String,
    /// As this user; root if not given.
    #[serde(default)]
    pub user: Option<String>,
}

/// `POST /v1/machines/{id}/files/list`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ListFiles {
    /// Absolute path of a directory.
    pub path: String,
    /// Levels of directories, 1 to 64; 1 if not given.
    #[serde(default)]
    pub depth: Option<u32>,
    /// Leave out so many entries.
    #[serde(default)]
    pub skip: u64,
    /// At most so many entries, 1 to 10000; 1000 if not given.
    #[serde(default)]
    pub limit: Option<u64>,
    /// As this user; root if not given.
    #[serde(default)]
    pub user: Option<String>,
}

/// Answer to a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct FileList {
    /// By name, each directory followed by what it holds.
    pub entries: Vec<FileEntry>,
    /// There are more: ask with `skip` for them.
    pub more: bool,
}

/// `POST /v1/machines/{id}/files/remove`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RemoveFile {
    /// Absolute path.
    pub path: String,
    /// Directories with everything in them too.
    #[serde(default)]
    pub recursive: bool,
    /// As this user; root if not given.
    #[serde(default)]
    pub user: Option<String>,
}

/// `POST /v1/machines/{id}/files/rename`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RenameFile {
    /// Absolute path.
    pub from: String,
    /// Absolute path; what is there is replaced.
    pub to: String,
    /// As this user; root if not given.
    #[serde(default)]
    pub user: Option<String>,
}

/// `POST /v1/machines/{id}/files/attributes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SetAttributes {
    /// Absolute path.
    pub path: String,
    /// What to change.
    pub attributes: FileAttributes,
    /// As this user; root if not given.
    #[serde(default)]
    pub user: Option<String>,
}

/// `GET /v1/machines/{id}/metrics`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Metrics {
    /// Unix time in milliseconds.
    pub at_unix_ms: u64,
    /// Busy share of all CPUs together since the question before, 0 to 100.
    pub cpu_percent: f64,
    /// Number of CPUs.
    pub cpus: u32,
    /// Busy CPU time since boot, in microseconds.
    pub cpu_busy_us: u64,
    /// Memory in use, in bytes.
    pub mem_used_bytes: u64,
    /// Memory in all, in bytes.
    pub mem_total_bytes: u64,
    /// Root file system in use, in bytes.
    pub disk_used_bytes: u64,
    /// Root file system in all, in bytes.
    pub disk_total_bytes: u64,
    /// Received since boot, in bytes.
    pub net_rx_bytes: u64,
    /// Sent since boot, in bytes.
    pub net_tx_bytes: u64,
}

/// `GET /v1/machines/{id}/why`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Why {
    /// The machine.
    pub machine_id: MachineId,
    /// What it is doing.
    pub status: MachineStatus,
    /// Why, in one sentence.
    pub because: String,
    /// The event that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<Event>,
    /// The lease, which ends its being awake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// A command runs in it on somebody's behalf, which a sliding lease waits for.
    pub at_work: bool,
    /// When each source of activity was last seen in this run, the last one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub activity: Vec<crate::activity::ActivitySign>,
    /// Milliseconds until its least time awake is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_awake_remaining_ms: Option<u64>,
    /// The hold that code inside has on it, which a sliding lease waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<HoldState>,
}
