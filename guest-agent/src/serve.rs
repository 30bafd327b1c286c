//! From a request to the operation that answers it, on the thread it belongs on.
//!
//! Quick requests are answered on the caller's thread, always. Everything that can take time gets a
//! thread, at most [`MAX_WORKERS`] of them, and a socket that gives up on a peer that stalls.

use crate::errors::{Failed, os};
use crate::exec::Execs;
use crate::hold::Holds;
use crate::shutdown::{Ending, Shutdown};
use crate::{files, forward, mounts, resync, threads, usage, wire};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use torpor_api::guest::{GuestError, GuestErrorCode, GuestRequest, GuestResponse};

/// Most operations that have a thread at one time.
const MAX_WORKERS: usize = 256;
/// How long a quick answer may take to fit into the socket. It always fits at once.
const QUICK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a peer may stall in the middle of an operation.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Everything that operations share.
#[derive(Debug)]
pub struct Server {
    /// Running processes.
    pub execs: Execs,
    /// The end of the machine.
    pub shutdown: Shutdown,
    holds: Holds,
    random: Option<File>,
    processes: Arc<AtomicUsize>,
    workers: Arc<AtomicUsize>,
}

impl Server {
    /// Make everything that a wake will need, so that it needs no path lookup then.
    pub fn new(open_files: (u64, u64), shutdown: Shutdown) -> Self {
        Self {
            execs: Execs::new(open_files),
            holds: Holds::default(),
            shutdown,
            random: File::options().write(true).open("/dev/random").ok(),
            processes: Arc::default(),
            workers: Arc::default(),
        }
    }

    /// Serve the request in `payload`, here or on a thread of its own. The connection, if it is to stay until the host closes
    /// it: that of a resync, whose end would cost the guest time just when somebody waits for its first answer.
    pub fn serve(self: &Arc<Self>, mut socket: UnixStream, payload: &[u8]) -> Option<UnixStream> {
        let refuse = |socket: &mut UnixStream, code, message: String| {
            wire::finish(socket, Err(wire::error(code, message)));
            None
        };
        let _ = socket.set_nonblocking(false);
        let _ = socket.set_write_timeout(Some(QUICK_TIMEOUT));
        let request = match serde_json::from_slice::<GuestRequest>(payload) {
            Ok(request) => request,
            Err(error) => {
                let message = format!("no request of this protocol: {error}");
                return refuse(&mut socket, GuestErrorCode::BadRequest, message);
            }
        };
        if let Some(result) = self.answer_quickly(&request) {
            wire::finish(&mut socket, result.map_err(|failed| failed.0));
            if let GuestRequest::Shutdown { reboot } = request {
                self.shutdown
                    .throw(if reboot { Ending::Reboot } else { Ending::PowerOff });
            }
            return matches!(request, GuestRequest::Resync { .. }).then_some(socket);
        }
        if self.shutdown.ending().is_some() {
            return refuse(
                &mut socket,
                GuestErrorCode::Os,
                "the machine is shutting down".to_owned(),
            );
        }
        let (count, what) = match &request {
            // A process lives for as long as it likes, and must leave room for everything else.
            GuestRequest::Exec(_) => (&self.processes, "processes"),
            _ => (&self.workers, "operations"),
        };
        let Some(worker) = Worker::register(self, count) else {
            let message = format!("{MAX_WORKERS} {what} are running already");
            return refuse(&mut socket, GuestErrorCode::Os, message);
        };
        // The peer learns of a thread that could not start by the connection closing.
        if let Err(error) = threads::start("operation", move || worker.run(socket, request)) {
            crate::log::line(
                crate::log::Level::Error,
                format_args!("cannot start a thread: {error}"),
            );
        }
        None
    }

    /// Serve a request of a process in the guest, which may do little.
    pub fn serve_inside(&self, mut socket: UnixStream, payload: &[u8]) {
        let _ = socket.set_nonblocking(false);
        let _ = socket.set_write_timeout(Some(QUICK_TIMEOUT));
        let result = match serde_json::from_slice::<GuestRequest>(payload) {
            Ok(
                request @ (GuestRequest::Ping
                | GuestRequest::HoldState
                | GuestRequest::Hold { .. }
                | GuestRequest::Release),
            ) => self.answer_quickly(&request),
            Ok(_) | Err(_) => None,
        };
        let refused = || {
            let message = "from inside there is hold, release and their state".to_owned();
            Err(wire::error(GuestErrorCode::BadRequest, message))
        };
        wire::finish(
            &mut socket,
            result.map_or_else(refused, |result| result.map_err(|failed| failed.0)),
        );
    }

    /// The answer to a request that takes no time; `None` for any other.
    fn answer_quickly(&self, request: &GuestRequest) -> Option<Result<GuestResponse, Failed>> {
        Some(match request {
            GuestRequest::Ping => Ok(GuestResponse::Pong {
                version: env!("CARGO_PKG_VERSION").to_owned(),
            }),
            GuestRequest::Resync {
                wall_unix_ns,
                entropy,
            } => resync::resync(self.random.as_ref(), *wall_unix_ns, entropy).map_err(Failed::from),
            GuestRequest::Probe { port } => usage::probe(*port),
            GuestRequest::Metrics => usage::metrics(),
            GuestRequest::SignalGroup { pid, signal } => self.signal_group(*pid, *signal),
            GuestRequest::Processes => Ok(GuestResponse::Processes {
                processes: self.execs.processes(),
            }),
            GuestRequest::HoldState => Ok(self.holds.state()),
            GuestRequest::Hold { seconds, reason } => Ok(self.holds.take(*seconds, reason)),
            GuestRequest::Release => Ok(self.holds.release()),
            GuestRequest::Shutdown { .. } => Ok(GuestResponse::Done),
            GuestRequest::Exec(_)
            | GuestRequest::Attach(_)
            | GuestRequest::Tell { .. }
            | GuestRequest::Quiesce
            | GuestRequest::Forward { .. }
            | GuestRequest::FileRead { .. }
            | GuestRequest::FileWrite { .. }
            | GuestRequest::FileList { .. }
            | GuestRequest::FileStat { .. }
            | GuestRequest::FileSet { .. }
            | GuestRequest::MakeDir { .. }
            | GuestRequest::Symlink { .. }
            | GuestRequest::FileMove { .. }
            | GuestRequest::FileRemove { .. } => return None,
        })
    }

    fn signal_group(&self, pid: u32, signal: i32) -> Result<GuestResponse, Failed> {
        // No PID is over i32::MAX, and 0 and 1 are never a child's.
        let pid = i32::try_from(pid).unwrap_or(0);
        self.execs.signal(pid, signal)?;
        Ok(GuestResponse::Done)
    }
}

/// One of the operations that have a thread; counted from creation to drop.
struct Worker {
    server: Arc<Server>,
    count: Arc<AtomicUsize>,
}

impl Worker {
    fn register(server: &Arc<Server>, count: &Arc<AtomicUsize>) -> Option<Self> {
        let worker = Self {
            server: Arc::clone(server),
            count: Arc::clone(count),
        };
        (count.fetch_add(1, Ordering::Relaxed) < MAX_WORKERS).then_some(worker)
    }

    fn run(&self, mut socket: UnixStream, request: GuestRequest) {
        let timeouts = socket
            .set_read_timeout(Some(STALL_TIMEOUT))
            .and_then(|()| socket.set_write_timeout(Some(STALL_TIMEOUT)));
        if let Err(error) = timeouts {
            let error = os("cannot set the connection's time-outs", &error);
            return wire::finish(&mut socket, Err(error));
        }
        match request {
            GuestRequest::Exec(spec) => return self.server.execs.serve(socket, &spec),
            GuestRequest::Attach(spec) => return self.server.execs.attach(socket, spec),
            GuestRequest::Tell { pid, what } => return self.server.execs.tell(socket, pid, what),
            GuestRequest::Forward { address, port } => return forward::serve(socket, address, port),
            _ => {}
        }
        let result = run_slow(&mut socket, request);
        wire::finish(&mut socket, result.map_err(|failed| failed.0));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

fn run_slow(socket: &mut UnixStream, request: GuestRequest) -> Result<GuestResponse, Failed> {
    files::act_as(user_of(&request))?;
    match request {
        GuestRequest::Quiesce => mounts::quiesce(),
        GuestRequest::FileRead {
            path, offset, len, ..
        } => files::read(socket, &path, offset, len),
        GuestRequest::FileWrite {
            path,
            mode,
            append,
            offset,
            exclusive,
            ..
        } => {
            let how = files::How {
                mode,
                append,
                offset,
                exclusive,
            };
            files::write(socket, &path, how)
        }
        GuestRequest::FileList {
            path,
            depth,
            skip,
            limit,
            ..
        } => files::list(socket, &path, files::Wanted { depth, skip, limit }),
        GuestRequest::FileStat { path, follow, .. } => files::stat(&path, follow),
        GuestRequest::FileSet { path, attributes, .. } => files::set(&path, &attributes),
        GuestRequest::MakeDir { path, .. } => files::make_dir(&path),
        GuestRequest::Symlink { path, target, .. } => files::symlink(&path, &target),
        GuestRequest::FileMove { from, to, .. } => files::rename(&from, &to),
        GuestRequest::FileRemove { path, recursive, .. } => files::remove(&path, recursive),
        GuestRequest::Ping
        | GuestRequest::Resync { .. }
        | GuestRequest::Probe { .. }
        | GuestRequest::Exec(_)
        | GuestRequest::Attach(_)
        | GuestRequest::Tell { .. }
        | GuestRequest::Forward { .. }
        | GuestRequest::Processes
        | GuestRequest::HoldState
        | GuestRequest::Hold { .. }
        | GuestRequest::Release
        | GuestRequest::SignalGroup { .. }
        | GuestRequest::Shutdown { .. }
        | GuestRequest::Metrics => Err(misrouted().into()),
    }
}

/// As whom a file operation is done.
fn user_of(request: &GuestRequest) -> Option<&str> {
    match request {
        GuestRequest::FileRead { user, .. }
        | GuestRequest::FileWrite { user, .. }
        | GuestRequest::FileList { user, .. }
        | GuestRequest::FileStat { user, .. }
        | GuestRequest::FileSet { user, .. }
        | GuestRequest::MakeDir { user, .. }
        | GuestRequest::Symlink { user, .. }
        | GuestRequest::FileMove { user, .. }
        | GuestRequest::FileRemove { user, .. } => user.as_deref(),
        _ => None,
    }
}

/// A request that `serve` answers elsewhere came here: a defect, but no reason to panic.
fn misrouted() -> GuestError {
    wire::error(
        GuestErrorCode::Os,
        "the agent routed a request wrongly".to_owned(),
    )
}
