//! A process that outlives its request: output goes to files, the answer comes right after the start.
//!
//! `<run dir>/exec/<pid>.out` and `.err` hold the output. They lie in memory, so when a new process
//! starts, the logs of ended ones beyond the newest [`KEPT_LOGS`] are removed.

use super::command::prepare;
use super::{ExecError, Execs};
use crate::children::Child;
use crate::sys::spawn::Streams;
use crate::wire;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};
use torpor_api::guest::{ExecSpec, FrameType, GuestResponse};

const KEPT_LOGS: usize = 64;

/// Start a process, answer, and watch its time-out if it has one. The answer is sent here.
pub fn run(
    execs: &Execs,
    socket: &mut UnixStream,
    spec: &ExecSpec,
) -> Result<Option<GuestResponse>, ExecError> {
    let deadline = spec
        .timeout_ms
        .and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
    let command = prepare(spec, execs.open_files)?;
    fs::create_dir_all(&execs.logs).map_err(ExecError::os("make the directory of logs"))?;
    prune(execs);
    let logs = Logs::create(&execs.logs)?;
    let null = File::open("/dev/null").map_err(ExecError::os("open /dev/null"))?;
    let streams = Streams {
        stdin: null.as_fd(),
        stdout: logs.out.as_fd(),
        stderr: logs.err.as_fd(),
        terminal: false,
    };
    let child = match execs.start(&command.program, &streams) {
        Ok(child) => child,
        Err(error) => {
            logs.remove();
            return Err(error);
        }
    };
    logs.name_after(child.pid())?;
    let pid = u32::try_from(child.pid()).unwrap_or(0);
    if let Ok(started) = wire::frame(FrameType::Started, &pid.to_le_bytes()) {
        let _ = socket.write_all(&started);
    }
    wire::finish(
        socket,
        Ok(GuestResponse::Exited {
            pid,
            code: None,
            timed_out: false,
        }),
    );
    // The thread may stay for the time-out, the connection must not.
    let _ = socket.shutdown(Shutdown::Both);
    if let Some(deadline) = deadline {
        kill_at(execs, &child, deadline);
    }
    Ok(None)
}

fn kill_at(execs: &Execs, child: &Child, deadline: Instant) {
    while child.code().is_none() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let _ = execs.children.signal(child.pid(), libc::SIGKILL);
            return;
        }
        let ms = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let _ = poll(
            &mut [PollFd::new(child.ended(), PollFlags::POLLIN)],
            PollTimeout::from(ms),
        );
    }
}

/// The two files, under a name of their own until the PID is known.
struct Logs<'a> {
    directory: &'a Path,
    number: u64,
    out: File,
    err: File,
}

impl<'a> Logs<'a> {
    fn create(directory: &'a Path) -> Result<Self, ExecError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let create = |kind: &str| {
            File::create(directory.join(format!(".new-{number}.{kind}"))).map_err(ExecError::os("make a log"))
        };
        Ok(Self {
            directory,
            number,
            out: create("out")?,
            err: create("err")?,
        })
    }

    fn name_after(&self, pid: i32) -> Result<(), ExecError> {
        for kind in ["out", "err"] {
            let from = self.directory.join(format!(".new-{}.{kind}", self.number));
            let to = self.directory.join(format!("{pid}.{kind}"));
            fs::rename(from, to).map_err(ExecError::os("name a log"))?;
        }
        Ok(())
    }

    fn remove(&self) {
        for kind in ["out", "err"] {
            let _ = fs::remove_file(self.directory.join(format!(".new-{}.{kind}", self.number)));
        }
    }
}

fn prune(execs: &Execs) {
    let Ok(entries) = fs::read_dir(&execs.logs) else {
        return;
    };
    let mut ended: Vec<(SystemTime, std::path::PathBuf)> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| pid_of(path).is_some_and(|pid| !execs.children.is_running(pid)))
        .filter_map(|path| Some((modified(&path).ok()?, path)))
        .collect();
    ended.sort();
    let excess = ended.len().saturating_sub(2 * KEPT_LOGS);
    for (_, path) in ended.into_iter().take(excess) {
        let _ = fs::remove_file(path);
    }
}

fn pid_of(path: &Path) -> Option<i32> {
    path.file_stem()?.to_str()?.parse().ok()
}

fn modified(path: &Path) -> io::Result<SystemTime> {
    fs::metadata(path)?.modified()
}
