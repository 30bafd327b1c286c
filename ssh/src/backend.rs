//! What the gateway asks of whoever knows machines.
//!
//! Owns the [`Backend`] trait and the values that pass through it. Nothing here does I/O. Everything a backend
//! hands out outlives a pause of its machine if the backend can make it so: the gateway never asks whether a
//! machine sleeps.

use async_trait::async_trait;
use bytes::Bytes;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncWrite};
use torpor_api::guest::WindowSize;
use torpor_api::{ErrorCode, MachineId};

use crate::authority::Claims;

/// Knows machines, and who may enter them.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Whether this credential opens this machine. Never wakes, and answers fast.
    async fn log_in(&self, attempt: LoginAttempt<'_>) -> Result<Login, Denied>;

    /// The machine of a login, awake. May take as long as a bounded wake takes. Dropping the future cancels
    /// this waiter and nothing else.
    async fn wake(&self, login: &Login) -> Result<std::sync::Arc<dyn Guest>, Refusal>;
}

/// A machine that somebody is logged in to.
#[async_trait]
pub trait Guest: Send + Sync + 'static {
    /// Start a process. Dropping both of its halves ends its group.
    async fn start(&self, order: ProcessOrder) -> Result<Process, Refusal>;

    /// A TCP connection to `host` and `port` as the guest sees them.
    async fn connect(&self, host: &str, port: u16) -> Result<Box<dyn Stream>, Refusal>;

    /// The guest's files.
    async fn files(&self) -> Result<std::sync::Arc<dyn Files>, Refusal>;
}

/// Somebody at the door.
#[derive(Debug)]
pub struct LoginAttempt<'a> {
    /// Machine ID, alias or name as the client wrote it; for a certificate, the one it names. Not validated.
    pub machine: &'a str,
    /// User in the guest, if the client named one. Not validated.
    pub user: Option<&'a str>,
    /// What is shown.
    pub credential: Credential<'a>,
    /// The client's address.
    pub client: SocketAddr,
}

/// What somebody at the door shows.
pub enum Credential<'a> {
    /// The API key that the user name carried.
    ApiKey(&'a str),
    /// A key whose owner has proved, or is about to prove, that it is theirs.
    PublicKey(&'a PublicKey),
    /// A password.
    Password(&'a str),
    /// A certificate of this gateway's own authority, valid now.
    Certificate(&'a Claims),
}

impl std::fmt::Debug for Credential<'_> {
    /// Secrets stay secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ApiKey(_) => f.write_str("ApiKey"),
            Self::PublicKey(key) => f.debug_tuple("PublicKey").field(&key.fingerprint).finish(),
            Self::Password(_) => f.write_str("Password"),
            Self::Certificate(claims) => f.debug_tuple("Certificate").field(&claims.access_id).finish(),
        }
    }
}

/// A client's public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    /// `SHA256:` and the digest, as `ssh-keygen -l` prints it.
    pub fingerprint: String,
}

/// Somebody who was let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The machine.
    pub machine: MachineId,
    /// User in the guest.
    pub user: String,
    /// How they proved who they are, for the events table: `api_key`, `machine_key`, …
    pub by: &'static str,
    /// The client's address.
    pub client: SocketAddr,
}

/// Not let in. Why is for the log, never for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No such machine, or the credential is not one of its own.
    #[error("unknown machine or credential")]
    Unknown,
    /// The machine is asleep and its wake switch for SSH is off.
    #[error("the machine is asleep, and its wake switch for SSH is off")]
    Asleep,
    /// The backend itself failed.
    #[error("{0}")]
    Failed(String),
}

/// Something that was not done, and why; the client gets to read it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({})", code.as_str())]
pub struct Refusal {
    /// Stable code.
    pub code: ErrorCode,
    /// What failed, on what.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessOrder {
    /// The program.
    pub program: Program,
    /// Environment that the client asked for.
    pub env: Vec<(String, String)>,
    /// Under a terminal.
    pub terminal: Option<Terminal>,
}

/// A program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// The user's login shell.
    Shell,
    /// A command line for the user's shell.
    CommandLine(String),
}

/// A terminal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terminal {
    /// Value of `TERM`.
    pub term: String,
    /// Size.
    pub size: WindowSize,
}

/// A running process.
pub struct Process {
    /// What goes in.
    pub input: Box<dyn ProcessInput>,
    /// What comes out.
    pub output: Box<dyn ProcessOutput>,
}

/// What goes into a process. Bytes arrive in the order of the calls.
#[async_trait]
pub trait ProcessInput: Send {
    /// Bytes for standard input. May wait for as long as the process does not read.
    async fn write(&mut self, bytes: Bytes) -> Result<(), Refusal>;
    /// No more bytes.
    async fn close(&mut self) -> Result<(), Refusal>;
    /// The terminal has another size.
    async fn resize(&mut self, size: WindowSize) -> Result<(), Refusal>;
    /// Signal the process's group.
    async fn signal(&mut self, signal: u32) -> Result<(), Refusal>;
}

/// What comes out of a process.
#[async_trait]
pub trait ProcessOutput: Send {
    /// The next event; [`ProcessEvent::Exited`] and [`ProcessEvent::Killed`] are the last ones. Not
    /// cancel-safe.
    async fn next(&mut self) -> Result<ProcessEvent, Refusal>;
}

/// What a process did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessEvent {
    /// Wrote to standard output.
    Stdout(Bytes),
    /// Wrote to standard error.
    Stderr(Bytes),
    /// Ended.
    Exited {
        /// Exit code.
        code: u32,
    },
    /// Was ended by a signal.
    Killed {
        /// Number of the signal.
        signal: u32,
    },
}

/// Bytes both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Why a file operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// No such file or directory.
    #[error("{0}")]
    NotFound(String),
    /// Not allowed.
    #[error("{0}")]
    Denied(String),
    /// This backend cannot do that.
    #[error("{0}")]
    Unsupported(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

/// Kinds of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Device, pipe, socket.
    Other,
}

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Kind.
    pub kind: FileKind,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Last access in Unix seconds.
    pub accessed_unix_s: u32,
    /// Last change in Unix seconds.
    pub modified_unix_s: u32,
}

/// What is to be changed of a file; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NewAttributes {
    /// Size in bytes: cut, or filled up with zeros.
    pub size: Option<u64>,
    /// Permission bits.
    pub mode: Option<u32>,
    /// User and group ID.
    pub owner: Option<(u32, u32)>,
    /// Last access and last change in Unix seconds.
    pub times_unix_s: Option<(u32, u32)>,
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Name.
    pub name: String,
    /// What is known of it; links are not followed.
    pub attributes: Attributes,
}

/// How to open a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenOrder {
    /// To read.
    pub read: bool,
    /// To write.
    pub write: bool,
    /// Make it if it is missing.
    pub create: bool,
    /// Empty it.
    pub truncate: bool,
    /// Fail if it is there.
    pub exclusive: bool,
    /// Permission bits of a new file.
    pub mode: Option<u32>,
}

/// Where bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// From this offset on.
    At(u64),
    /// At the end.
    End,
}

/// The files of a guest. Every path is absolute. There are no handles: an operation that comes after a pause
/// finds what it needs by the path.
#[async_trait]
pub trait Files: Send + Sync + 'static {
    /// The user's home directory.
    async fn home(&self) -> Result<String, FileError>;
    /// What is at a path; a link itself unless `follow`.
    async fn stat(&self, path: &str, follow: bool) -> Result<Attributes, FileError>;
    /// Entries of a directory.
    async fn list(&self, path: &str) -> Result<Vec<DirectoryEntry>, FileError>;
    /// Make, empty or just look at a file, as its opening asks.
    async fn open(&self, path: &str, order: OpenOrder) -> Result<(), FileError>;
    /// At most `len` bytes from `offset`; none at the end.
    async fn read(&self, path: &str, offset: u64, len: u32) -> Result<Bytes, FileError>;
    /// Write all of the bytes into a file that is there.
    async fn write(&self, path: &str, place: Place, bytes: Bytes) -> Result<(), FileError>;
    /// Change what is given.
    async fn set_attributes(&self, path: &str, new: NewAttributes) -> Result<(), FileError>;
    /// Make one directory.
    async fn make_dir(&self, path: &str, mode: Option<u32>) -> Result<(), FileError>;
    /// Remove anything but a directory.
    async fn remove_file(&self, path: &str) -> Result<(), FileError>;
    /// Remove an empty directory.
    async fn remove_dir(&self, path: &str) -> Result<(), FileError>;
    /// Rename; what is at `to` is replaced only if `replace`.
    async fn rename(&self, from: &str, to: &str, replace: bool) -> Result<(), FileError>;
    /// Make a symbolic link at `path` with this text.
    async fn symlink(&self, target: &str, path: &str) -> Result<(), FileError>;
    /// The text of a symbolic link.
    async fn read_link(&self, path: &str) -> Result<String, FileError>;
    /// The path without links, `.` and `..`; a last part that is missing is allowed.
    async fn resolve(&self, path: &str) -> Result<String, FileError>;
}
