//! The run directory of one VMM: its sockets, its log and `execution.json`, which is what a restarted torpord
//! knows of it.
//!
//! A blank VMM's directory has a name of its own and gets the execution's by rename, sockets and all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use torpor_api::vmm::Shape;
use torpor_api::{ExecutionId, MachineId};

use super::process::ProcessId;

/// What the directory of a blank VMM begins with.
const BLANK: &str = "blank-";
/// Longest record that is read.
const MAX_LEN: u64 = 64 << 10;
/// The one version of the format so far.
const FORMAT: u32 = 1;

/// The machine that an execution runs: all that is needed to write its manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineRecord {
    /// The machine.
    pub machine_id: MachineId,
    /// This run of it.
    pub execution_id: ExecutionId,
    /// What the VM was built as.
    pub shape: Shape,
    /// The machine's template.
    pub template: String,
    /// Its digest.
    pub template_digest: String,
    /// Network slot.
    pub slot: u16,
}

/// `execution.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Version of the format.
    pub format: u32,
    /// The VMM's process.
    pub process: ProcessId,
    /// Absent while the VMM is blank.
    pub machine: Option<MachineRecord>,
}

impl Record {
    /// A record of this version.
    #[must_use]
    pub fn new(process: ProcessId, machine: Option<MachineRecord>) -> Self {
        Self {
            format: FORMAT,
            process,
            machine,
        }
    }
}

/// Why a run directory could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}", path.display())]
pub struct RunDirError {
    operation: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError {
        operation,
        path,
        source,
    }
}

/// A directory under `/run/torpor/exec`.
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// A new directory for a blank VMM called `name`, under `exec_dir`.
    ///
    /// # Errors
    /// It is there already, or can't be made.
    pub fn create_blank(exec_dir: &Path, name: &str) -> Result<Self, RunDirError> {
        let dir = exec_dir.join(format!("{BLANK}{name}"));
        let made = DirBuilder::new().mode(0o700).create(&dir);
        made.map_err(failed("make directory", &dir))?;
        Ok(Self(dir))
    }

    /// Every run directory under `exec_dir`.
    ///
    /// # Errors
    /// It can't be listed.
    pub fn all(exec_dir: &Path) -> Result<Vec<Self>, RunDirError> {
        let entries = fs::read_dir(exec_dir).map_err(failed("list", exec_dir))?;
        entries
            .map(|entry| Ok(Self(entry.map_err(failed("list", exec_dir))?.path())))
            .collect()
    }

    /// Give the directory the name of the execution that its VMM runs from now on, and record that: a restarted torpord finds it.
    ///
    /// # Errors
    /// The name is taken, or the file system refuses.
    pub fn claim(&mut self, process: ProcessId, machine: MachineRecord) -> Result<(), RunDirError> {
        let named = self.0.with_file_name(machine.execution_id.as_str());
        fs::rename(&self.0, &named).map_err(failed("rename", &self.0))?;
        self.0 = named;
        self.write_record(&Record::new(process, Some(machine)))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Path of the control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// Path of the vsock socket.
    #[must_use]
    pub fn vsock_socket(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    /// A listener on the control socket, for the VMM to inherit.
    ///
    /// # Errors
    /// It can't be bound.
    pub fn listen_control(&self) -> Result<OwnedFd, RunDirError> {
        let path = self.control_socket();
        torpor_ipc::listen_at(&path).map_err(|error| failed("listen at", &path)(io::Error::other(error)))
    }

    /// A listener on the vsock socket, for the VMM to be given.
    ///
    /// # Errors
    /// It can't be bound.
    pub fn listen_vsock(&self) -> Result<OwnedFd, RunDirError> {
        let path = self.vsock_socket();
        Ok(UnixListener::bind(&path)
            .map_err(failed("listen at", &path))?
            .into())
    }

    /// Where the VMM's output goes.
    ///
    /// # Errors
    /// It can't be made.
    pub fn open_log(&self) -> Result<File, RunDirError> {
        let path = self.0.join("vmm.log");
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600);
        options.open(&path).map_err(failed("open", &path))
    }

    /// The end of the VMM's output, for an error message.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read(self.0.join("vmm.log")).unwrap_or_default();
        let tail = &text[text.len().saturating_sub(400)..];
        String::from_utf8_lossy(tail).trim().to_owned()
    }

    /// Write `execution.json`. Whole or not at all; not synced, because the directory ends with the host's uptime.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn write_record(&self, record: &Record) -> Result<(), RunDirError> {
        let path = self.0.join("execution.json");
        let temporary = self.0.join("execution.tmp");
        let write = || -> io::Result<()> {
            let json = serde_json::to_vec(record)?;
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&temporary)?.write_all(&json)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(failed("write", &path))
    }

    /// What `execution.json` says.
    ///
    /// # Errors
    /// It is not there or makes no sense.
    pub fn read_record(&self) -> Result<Record, RunDirError> {
        let path = self.0.join("execution.json");
        let read = || -> io::Result<Record> {
            let mut json = Vec::new();
            File::open(&path)?.take(MAX_LEN).read_to_end(&mut json)?;
            let record: Record = serde_json::from_slice(&json)?;
            if record.format == FORMAT {
                Ok(record)
            } else {
                Err(io::Error::other(format!(
                    "format {} is not {FORMAT}",
                    record.format
                )))
            }
        };
        read().map_err(failed("read", &path))
    }

    /// Remove the directory and all in it; no directory is no error.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "run directory not removed");
        }
    }
}
