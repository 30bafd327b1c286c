//! Processes of the guest as they go over the wire.
//!
//! A *kept* process lives on when its client goes, which happens at every pause: the connection is reset by the
//! restore. The guest keeps the end of its output under absolute offsets (standard output and standard error in
//! one sequence), and tells how many bytes of standard input it has taken, so a client that attaches again with
//! the number of bytes that it got loses nothing in either direction.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A terminal's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// How to run a process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExecSpec {
    /// Program and arguments; a program without `/` is looked up in the PATH of `env`.
    pub argv: Vec<String>,
    /// Added to the default environment of the user.
    pub env: BTreeMap<String, String>,
    /// Working directory; the guest's default if not given.
    pub cwd: Option<String>,
    /// User name; root if not given.
    pub user: Option<String>,
    /// Take `Stdin` frames; otherwise standard input is empty.
    pub stdin: bool,
    /// Run under a terminal of this size; standard error is then part of standard output.
    pub tty: Option<WindowSize>,
    /// Kill the group after so many milliseconds of the guest's monotonic clock.
    pub timeout_ms: Option<u64>,
    /// A client that is gone leaves the process running, to be attached to again.
    pub keep: bool,
    /// Answer after `Started` and keep the process.
    pub background: bool,
}

/// Which process to attach to, and from where.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AttachSpec {
    /// PID.
    pub pid: u32,
    /// The serial that the process has; whichever had the PID last if not given.
    pub serial: Option<u64>,
    /// Number of bytes of output that are known already.
    pub offset: u64,
    /// Stay until the process ends; otherwise answer with what is kept.
    pub follow: bool,
    /// Take `Stdin` frames from this client, and from no other any more.
    pub input: bool,
}

/// First frame of a kept exec and of an attach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// PID.
    pub pid: u32,
    /// Tells processes apart that had the same PID.
    pub serial: u64,
    /// Offset of the first byte of output that follows; larger than asked for if what was before is not kept.
    pub offset: u64,
    /// Bytes of standard input that were taken so far from clients that joined.
    pub input_offset: u64,
    /// The end of standard input was taken.
    pub input_ended: bool,
}

/// What a process can be told by somebody who does not join it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ProcessOrder {
    /// Bytes of standard input, base64.
    Input(String),
    /// No more input.
    InputEnd,
    /// The terminal has another size.
    Resize(WindowSize),
}

/// A process that an exec started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ProcessEntry {
    /// PID.
    pub pid: u32,
    /// Tells processes apart that had the same PID.
    pub serial: u64,
    /// Program and arguments, cut off when they are long.
    pub argv: Vec<String>,
    /// Unix time of its start in milliseconds.
    pub started_unix_ms: u64,
    /// Whether it runs.
    pub running: bool,
    /// Exit code, or 128 + signal, once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// It was killed because its time was up.
    pub timed_out: bool,
    /// Size of its terminal, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<WindowSize>,
    /// It was started in the background.
    pub background: bool,
    /// Offsets of the first byte of output that is kept and of the byte after the last.
    pub output: (u64, u64),
}

/// A hold that somebody inside has on the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct HoldState {
    /// Left of it, in milliseconds.
    pub remaining_ms: u64,
    /// What for.
    pub reason: String,
}
