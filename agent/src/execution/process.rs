//! VMM processes: starting them so that they outlive torpord, knowing them again, and seeing them end.
//!
//! A process is named by PID and start time together, because PIDs are reused, and held by pidfd. Own children
//! are reaped by one small task each; those of an earlier torpord are init's.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::sys;

/// Exists while systemd is the service manager.
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// What names a process for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessId {
    /// PID.
    pub pid: u32,
    /// Start time in clock ticks since boot, as in `/proc/<pid>/stat`.
    pub start_ticks: u64,
}

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The program did not start.
    #[error("cannot start {}", program.display())]
    Start {
        /// Its path.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It was started and can't be found.
    #[error("cannot watch process {pid}")]
    Watch {
        /// PID.
        pid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A live process, or one that ended while we looked.
pub struct Process {
    id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Start `program` in a scope of its own where systemd runs, so that a stop of torpord's service does not reach it.
    /// `listener` becomes its standard input ([`torpor_api::vmm::LISTEN_FD`]).
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(program: &Path, name: &str, listener: OwnedFd, log: File) -> Result<Self, ProcessError> {
        let failed = |source| ProcessError::Start {
            program: program.to_owned(),
            source,
        };
        let mut command = if Path::new(SYSTEMD_RUNS).exists() {
            let mut command = Command::new("systemd-run");
            command
                .args(["--scope", "--quiet", "--collect", "--slice=torpor.slice"])
                .arg(format!("--unit=torpor-vmm-{name}"))
                .arg("--")
                .arg(program);
            command
        } else {
            Command::new(program)
        };
        let error_log = log.try_clone().map_err(failed)?;
        command.stdin(Stdio::from(listener)).stdout(log).stderr(error_log);
        let mut child = tokio::process::Command::from(command).spawn().map_err(failed)?;
        let pid = child.id().unwrap_or(0);
        let process = Self::open(pid).map_err(|source| ProcessError::Watch { pid, source });
        tokio::spawn(async move { child.wait().await });
        process
    }

    /// The process that `id` names, if it still lives.
    #[must_use]
    pub fn find(id: ProcessId) -> Option<Self> {
        Self::open(id.pid).ok().filter(|process| process.id == id)
    }

    fn open(pid: u32) -> io::Result<Self> {
        let pidfd = sys::open_pidfd(pid)?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_ticks = start_ticks(&stat).ok_or(io::ErrorKind::InvalidData)?;
        let id = ProcessId { pid, start_ticks };
        Ok(Self { id, pidfd })
    }

    /// What names it.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Processor time that it has used, if it still lives.
    #[must_use]
    pub fn cpu_us(&self) -> Option<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id.pid)).ok()?;
        (start_ticks(&stat)? == self.id.start_ticks).then(|| cpu_us(&stat))?
    }

    /// End it at once; one that has ended stays so.
    pub fn kill(&self) {
        if let Err(error) = sys::kill(self.pidfd.get_ref().as_fd())
            && error.raw_os_error() != Some(libc::ESRCH)
        {
            tracing::error!(pid = self.id.pid, %error, "cannot kill a VMM");
        }
    }

    /// Whether it has ended, as of now rather than as of the last turn of the event loop.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.get_ref().as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n_ready| n_ready > 0)
    }

    /// Wait until it has ended and closed all that it had open.
    pub async fn ended(&self) {
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!(pid = self.id.pid, %error, "cannot wait for a VMM");
        }
    }
}

/// Field 22 of `/proc/<pid>/stat`. The second field is the program's name and may hold anything.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

/// Fields 14 and 15, user and system time in ticks of a hundredth of a second, which is what Linux shows everybody.
fn cpu_us(stat: &str) -> Option<u64> {
    const TICK_US: u64 = 10_000;
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    user.checked_add(system)?.checked_mul(TICK_US)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_a_name_with_spaces_and_brackets() {
        let stat = "7 (a) b) 1 2) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 123456 0 0";
        assert_eq!(start_ticks(stat), Some(123_456));
        assert_eq!(start_ticks("7 (a"), None);
        let stat = "7 (a) b) 1 2) S 1 7 7 0 -1 4194560 1 0 0 0 250 30 0 0 20 0 1 0 123456 0 0";
        assert_eq!(cpu_us(stat), Some(2_800_000));
    }

    #[tokio::test]
    async fn a_process_is_found_by_pid_and_start_time_together_and_seen_to_end() {
        let dir = tempfile::tempdir().unwrap();
        let listener = torpor_ipc::listen_at(&dir.path().join("s")).unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let process = Process::start(Path::new("/bin/cat"), "test", listener, log);
        // cat ends by itself: its standard input is empty.
        let process = process.unwrap();
        let id = process.id();
        let other = ProcessId {
            start_ticks: id.start_ticks + 1,
            ..id
        };
        assert!(Process::find(other).is_none());
        process.ended().await;
        assert!(process.has_ended());
        process.kill();
    }
}
