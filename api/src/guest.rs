//! Frame protocol between torpord and `torpor-guest`, over vsock port [`AGENT_PORT`].
//!
//! One connection carries one operation. The client opens with a [`FrameType::Request`] frame that
//! holds a [`GuestRequest`] as JSON; what follows depends on the operation and ends with one
//! [`FrameType::Response`] (a [`GuestResponse`]) or one [`FrameType::Error`] (a [`GuestError`]), after
//! which the guest closes. A frame is a type byte, a little-endian `u32` length and the payload.
//!
//! | operation | client sends | guest sends |
//! |---|---|---|
//! | exec | `Stdin`*, `StdinEof`, `Resize`*, `Signal`* | `Started`, (`Stdout` \| `Stderr`)*, then `Response` |
//! | file read | – | `Data`*, then `Response` |
//! | file write | `Data`*, `DataEof` | `Response` |
//! | all others | – | `Response` |

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// vsock port on which `torpor-guest` listens.
pub const AGENT_PORT: u32 = 1024;
/// Largest payload of one frame in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes before a payload.
pub const HEADER_LEN: usize = 5;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameType {
    /// JSON of a [`GuestRequest`].
    Request = 1,
    /// JSON of a [`GuestResponse`]; the last frame.
    Response = 2,
    /// JSON of a [`GuestError`]; the last frame.
    Error = 3,
    /// Bytes for the process.
    Stdin = 4,
    /// No more bytes for the process.
    StdinEof = 5,
    /// Bytes from the process.
    Stdout = 6,
    /// Bytes from the process.
    Stderr = 7,
    /// JSON of a [`WindowSize`].
    Resize = 8,
    /// Signal number as a little-endian `u32`, to the whole group.
    Signal = 9,
    /// PID as a little-endian `u32`.
    Started = 10,
    /// Bytes of a file.
    Data = 11,
    /// No more bytes of a file.
    DataEof = 12,
}

impl TryFrom<u8> for FrameType {
    type Error = FrameError;
    fn try_from(byte: u8) -> Result<Self, FrameError> {
        use FrameType::*;
        [
            Request, Response, Error, Stdin, StdinEof, Stdout, Stderr, Resize, Signal, Started, Data, DataEof,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
        .ok_or(FrameError::UnknownType(byte))
    }
}

/// Why a header is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No such type.
    #[error("unknown frame type {0}")]
    UnknownType(u8),
    /// Payload over [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes is over the limit of {MAX_PAYLOAD}")]
    TooLong(usize),
}

/// The header of a frame, checked: type and payload length.
///
/// # Errors
/// Unknown type, or a payload over [`MAX_PAYLOAD`].
pub fn decode_header(header: [u8; HEADER_LEN]) -> Result<(FrameType, usize), FrameError> {
    let [kind, a, b, c, d] = header;
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    if len > MAX_PAYLOAD {
        return Err(FrameError::TooLong(len));
    }
    Ok((FrameType::try_from(kind)?, len))
}

/// The header for a payload of this length.
///
/// # Errors
/// A payload over [`MAX_PAYLOAD`].
pub fn encode_header(kind: FrameType, len: usize) -> Result<[u8; HEADER_LEN], FrameError> {
    let len32 = u32::try_from(len).map_err(|_| FrameError::TooLong(len))?;
    if len > MAX_PAYLOAD {
        return Err(FrameError::TooLong(len));
    }
    let [a, b, c, d] = len32.to_le_bytes();
    Ok([kind as u8, a, b, c, d])
}

/// A terminal's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// What the host asks of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum GuestRequest {
    /// Is the agent there?
    Ping,
    /// After every restore, before anything else is let in: step the wall clock, stir the entropy pool.
    Resync {
        /// The host's wall clock when it sent this, in Unix nanoseconds.
        wall_unix_ns: u64,
        /// Fresh entropy, base64.
        entropy: String,
    },
    /// Does anything accept on this TCP port?
    Probe {
        /// Port.
        port: u16,
    },
    /// Run a process.
    Exec(ExecSpec),
    /// End or signal the group of a process that an exec started.
    SignalGroup {
        /// PID that the exec answered.
        pid: u32,
        /// Signal number.
        signal: i32,
    },
    /// Bring file systems to rest: flush what is dirty to the disk.
    Quiesce,
    /// Power off or reboot, cleanly.
    Shutdown {
        /// Come back.
        reboot: bool,
    },
    /// Usage figures.
    Metrics,
    /// Read a file from an offset.
    FileRead {
        /// Absolute path.
        path: String,
        /// First byte.
        #[serde(default)]
        offset: u64,
        /// Most bytes; to the end if not given.
        #[serde(default)]
        len: Option<u64>,
    },
    /// Write a file; parents are made.
    FileWrite {
        /// Absolute path.
        path: String,
        /// Permission bits; 0o644 if not given.
        #[serde(default)]
        mode: Option<u32>,
        /// Keep what is there and add to it.
        #[serde(default)]
        append: bool,
    },
    /// Entries of a directory.
    FileList {
        /// Absolute path.
        path: String,
    },
    /// What is at a path.
    FileStat {
        /// Absolute path.
        path: String,
    },
    /// Make a directory and its parents.
    MakeDir {
        /// Absolute path.
        path: String,
    },
    /// Rename.
    FileMove {
        /// Absolute path.
        from: String,
        /// Absolute path.
        to: String,
    },
    /// Remove a file or, with everything in it, a directory.
    FileRemove {
        /// Absolute path.
        path: String,
        /// Directories too.
        #[serde(default)]
        recursive: bool,
    },
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
    /// Answer after `Started`; the process lives on, its output goes to a log in the guest.
    pub background: bool,
}

/// What the guest answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum GuestResponse {
    /// Done, nothing to say.
    Done,
    /// To a ping.
    Pong {
        /// Version of the agent.
        version: String,
    },
    /// To a resync.
    Resynced {
        /// By how much the wall clock was stepped, in nanoseconds.
        step_ns: i64,
        /// The guest's wall clock after the step, in Unix nanoseconds.
        wall_unix_ns: u64,
    },
    /// To a probe.
    Probed {
        /// Something accepts.
        listening: bool,
    },
    /// To an exec: how the process ended. For a background one right after the start, without a code.
    Exited {
        /// PID.
        pid: u32,
        /// Exit code, or 128 + signal.
        code: Option<i32>,
        /// It was killed because its time was up.
        timed_out: bool,
    },
    /// To a metrics request.
    Metrics {
        /// Busy share of all CPUs since boot, in microseconds of CPU time.
        cpu_busy_us: u64,
        /// Memory in use, in bytes.
        mem_used_bytes: u64,
        /// Memory in all, in bytes.
        mem_total_bytes: u64,
        /// Root file system in use, in bytes.
        disk_used_bytes: u64,
        /// Root file system in all, in bytes.
        disk_total_bytes: u64,
    },
    /// To a stat.
    Stat {
        /// What is there.
        entry: FileEntry,
    },
    /// To a list.
    List {
        /// By name.
        entries: Vec<FileEntry>,
    },
    /// To a read or a write.
    Transferred {
        /// Bytes.
        bytes: u64,
    },
}

/// Kinds of directory entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileType {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Socket, device, pipe.
    Other,
}

/// A directory entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Last part of the path.
    pub name: String,
    /// Whole path.
    pub path: String,
    /// Kind; links are not followed.
    pub file_type: FileType,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Last change in Unix milliseconds.
    pub modified_unix_ms: i64,
    /// Where a link points.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// Why the guest could not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestErrorCode {
    /// The request is no request.
    BadRequest,
    /// No such file, process or user.
    NotFound,
    /// The operating system refused.
    Os,
    /// The program could not be started.
    ExecFailed,
}

/// An error of the guest agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// Code.
    pub code: GuestErrorCode,
    /// Operation, operands and causes.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_header_is_refused_or_survives_a_round_trip(header: [u8; HEADER_LEN]) {
            if let Ok((kind, len)) = decode_header(header) {
                prop_assert!(len <= MAX_PAYLOAD);
                prop_assert_eq!(encode_header(kind, len), Ok(header));
            }
        }
    }

    #[test]
    fn a_request_with_an_unknown_field_is_refused() {
        let known = r#"{"op":"probe","port":80}"#;
        assert_eq!(
            serde_json::from_str::<GuestRequest>(known).unwrap(),
            GuestRequest::Probe { port: 80 }
        );
        assert!(serde_json::from_str::<GuestRequest>(r#"{"op":"probe","port":80,"x":1}"#).is_err());
    }
}
