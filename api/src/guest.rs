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
//! | kept exec, attach | the same | `Attached`, (`Stdout` \| `Stderr` \| `InputTaken`)*, then `Response` |
//! | file list | – | `Entries`*, then `Response` |
//! | file read | – | `Data`*, then `Response` |
//! | file write | `Data`*, `DataEof` | `Response` |
//! | forward | `Data`*, `DataEof` | an empty `Data` when connected, then `Data`*, `DataEof` |
//! | all others | – | `Response` |

mod file;
mod process;

pub use file::{FileAttributes, FileEntry, FileType};
pub use process::{AttachSpec, Attached, ExecSpec, HoldState, ProcessEntry, ProcessOrder, WindowSize};

use serde::{Deserialize, Serialize};

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
    /// JSON of an [`Attached`].
    Attached = 13,
    /// How many bytes of standard input the process's session has taken so far, as a little-endian `u64`, and a
    /// byte that is 1 if it has taken the end, too.
    InputTaken = 14,
    /// JSON array of [`FileEntry`].
    Entries = 15,
}

impl TryFrom<u8> for FrameType {
    type Error = FrameError;
    fn try_from(byte: u8) -> Result<Self, FrameError> {
        use FrameType::*;
        [
            Request, Response, Error, Stdin, StdinEof, Stdout, Stderr, Resize, Signal, Started, Data,
            DataEof, Attached, InputTaken, Entries,
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
    /// Join the streams of a process that an exec started, or read what is kept of its output.
    Attach(AttachSpec),
    /// Tell a process that an exec started something, without joining it.
    Tell {
        /// PID.
        pid: u32,
        /// What.
        what: ProcessOrder,
    },
    /// The processes that execs started: those that run, and the last ones that ended.
    Processes,
    /// Who keeps the machine awake from inside.
    HoldState,
    /// Keep the machine awake, as long as it has a sliding lease. Only from inside the guest.
    Hold {
        /// For so long, counted while the machine is awake.
        seconds: u64,
        /// What for, for people.
        #[serde(default)]
        reason: String,
    },
    /// End the hold. Only from inside the guest.
    Release,
    /// Connect to a TCP port as a process of the guest would, and carry the bytes.
    Forward {
        /// Address, seen from the guest.
        address: std::net::IpAddr,
        /// Port.
        port: u16,
    },
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
        /// As this user; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
    /// Write a file; parents are made.
    FileWrite {
        /// Absolute path.
        path: String,
        /// Permission bits; 0o644 for a new file if not given.
        #[serde(default)]
        mode: Option<u32>,
        /// Keep what is there and add to it.
        #[serde(default)]
        append: bool,
        /// Keep what is there and write from this byte on.
        #[serde(default)]
        offset: Option<u64>,
        /// Refuse if something is there.
        #[serde(default)]
        exclusive: bool,
        /// As this user, who then owns a new file; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
    /// Entries of a directory, by name, each directory followed by what it holds.
    FileList {
        /// Absolute path.
        path: String,
        /// Levels of directories; 1 lists only this one.
        #[serde(default = "one")]
        depth: u32,
        /// Leave out so many entries from the beginning.
        #[serde(default)]
        skip: u64,
        /// At most so many entries; all if not given.
        #[serde(default)]
        limit: Option<u64>,
        /// As this user; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
    /// What is at a path.
    FileStat {
        /// Absolute path.
        path: String,
        /// Of what a link points to, not of the link.
        #[serde(default)]
        follow: bool,
        /// As this user; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
    /// Change what is given of a file's attributes; links are followed.
    FileSet {
        /// Absolute path.
        path: String,
        /// What to change.
        attributes: FileAttributes,
        /// As this user; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
    /// Make a directory and its parents.
    MakeDir {
        /// Absolute path.
        path: String,
        /// As this user, who then owns it; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
    /// Make a symbolic link.
    Symlink {
        /// Absolute path of the link.
        path: String,
        /// What it points to.
        target: String,
        /// As this user; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
    /// Rename; what is at the new path is replaced.
    FileMove {
        /// Absolute path.
        from: String,
        /// Absolute path.
        to: String,
        /// As this user; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
    /// Remove a file or, with everything in it, a directory.
    FileRemove {
        /// Absolute path.
        path: String,
        /// Directories with everything in them too.
        #[serde(default)]
        recursive: bool,
        /// As this user; root if not given.
        #[serde(default)]
        user: Option<String>,
    },
}

fn one() -> u32 {
    1
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
    /// To an exec or an attach: how the process ended. Without a code if it still runs: for a background exec,
    /// and for an attach that does not follow.
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
        /// Number of CPUs.
        #[serde(default)]
        cpus: u32,
        /// Length of the interval that `interval_busy_us` is of: since the question before, in microseconds.
        #[serde(default)]
        interval_us: u64,
        /// Busy share of all CPUs in that interval, in microseconds of CPU time.
        #[serde(default)]
        interval_busy_us: u64,
        /// Received by all network interfaces but loopback since boot, in bytes.
        #[serde(default)]
        net_rx_bytes: u64,
        /// Sent by them, in bytes.
        #[serde(default)]
        net_tx_bytes: u64,
    },
    /// To a stat.
    Stat {
        /// What is there.
        entry: FileEntry,
    },
    /// To a list, after its entries.
    Listed {
        /// There are more than were asked for.
        more: bool,
    },
    /// To a list of processes.
    Processes {
        /// Oldest first.
        processes: Vec<ProcessEntry>,
    },
    /// To a question about holds.
    Held {
        /// The hold, if there is one.
        hold: Option<HoldState>,
    },
    /// To a read or a write.
    Transferred {
        /// Bytes.
        bytes: u64,
    },
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
    /// The user may not.
    PermissionDenied,
    /// Something is there already, a directory is not empty, or a file is where a directory should be.
    Conflict,
    /// The guest's disk is full.
    NoSpace,
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
