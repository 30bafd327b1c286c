//! From a request to the operation that answers it, on the thread it belongs on.
//!
//! Quick requests are answered on the caller's thread, always. Everything that can take time gets a
//! thread, at most [`MAX_WORKERS`] of them, and a socket that gives up on a peer that stalls.

use crate::errors::{Failed, os};
use crate::exec::Execs;
use crate::shutdown::{Ending, Shutdown};
use crate::{files, mounts, resync, threads, usage, wire};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
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
    random: Option<File>,
    workers: AtomicUsize,
}

impl Server {
    /// Make everything that a wake will need, so that it needs no path lookup then.
    pub fn new(run_dir: &Path, open_files: (u64, u64), shutdown: Shutdown) -> Self {
        Self {
            execs: Execs::new(run_dir, open_files),
            shutdown,
            random: File::options().write(true).open("/dev/random").ok(),
            workers: AtomicUsize::new(0),
        }
    }

    /// Serve the request in `payload`, here or on a thread of its own.
    pub fn serve(self: &Arc<Self>, mut socket: UnixStream, payload: &[u8]) {
        let refuse = |socket: &mut UnixStream, code, message: String| {
            wire::finish(socket, Err(wire::error(code, message)));
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
            return;
        }
        if self.shutdown.ending().is_some() {
            return refuse(
                &mut socket,
                GuestErrorCode::Os,
                "the machine is shutting down".to_owned(),
            );
        }
        let Some(worker) = Worker::register(self) else {
            let message = format!("{MAX_WORKERS} operations are running already");
            return refuse(&mut socket, GuestErrorCode::Os, message);
        };
        // The peer learns of a thread that could not start by the connection closing.
        if let Err(error) = threads::start("operation", move || worker.run(socket, request)) {
            crate::log::line(
                crate::log::Level::Error,
                format_args!("cannot start a thread: {error}"),
            );
        }
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
            GuestRequest::Shutdown { .. } => Ok(GuestResponse::Done),
            GuestRequest::Exec(_)
            | GuestRequest::Quiesce
            | GuestRequest::FileRead { .. }
            | GuestRequest::FileWrite { .. }
            | GuestRequest::FileList { .. }
            | GuestRequest::FileStat { .. }
            | GuestRequest::MakeDir { .. }
            | GuestRequest::FileMove { .. }
            | GuestRequest::FileRemove { .. } => return None,
        })
    }

    fn signal_group(&self, pid: u32, signal: i32) -> Result<GuestResponse, Failed> {
        // No PID is over i32::MAX, and 0 and 1 are never a child's.
        let pid = i32::try_from(pid).unwrap_or(0);
        self.execs.children.signal(pid, signal)?;
        Ok(GuestResponse::Done)
    }
}

/// One of the operations that have a thread; counted from creation to drop.
struct Worker(Arc<Server>);

impl Worker {
    fn register(server: &Arc<Server>) -> Option<Self> {
        let worker = Self(Arc::clone(server));
        (server.workers.fetch_add(1, Ordering::Relaxed) < MAX_WORKERS).then_some(worker)
    }

    fn run(&self, mut socket: UnixStream, request: GuestRequest) {
        let timeouts = socket
            .set_read_timeout(Some(STALL_TIMEOUT))
            .and_then(|()| socket.set_write_timeout(Some(STALL_TIMEOUT)));
        if let Err(error) = timeouts {
            let error = os("cannot set the connection's time-outs", &error);
            return wire::finish(&mut socket, Err(error));
        }
        if let GuestRequest::Exec(spec) = &request {
            return self.0.execs.serve(socket, spec);
        }
        let result = run_slow(&mut socket, request);
        wire::finish(&mut socket, result.map_err(|failed| failed.0));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.workers.fetch_sub(1, Ordering::Relaxed);
    }
}

fn run_slow(socket: &mut UnixStream, request: GuestRequest) -> Result<GuestResponse, Failed> {
    match request {
        GuestRequest::Quiesce => mounts::quiesce(),
        GuestRequest::FileRead { path, offset, len } => files::read(socket, &path, offset, len),
        GuestRequest::FileWrite { path, mode, append } => files::write(socket, &path, mode, append),
        GuestRequest::FileList { path } => files::list(&path),
        GuestRequest::FileStat { path } => files::stat(&path),
        GuestRequest::MakeDir { path } => files::make_dir(&path),
        GuestRequest::FileMove { from, to } => files::rename(&from, &to),
        GuestRequest::FileRemove { path, recursive } => files::remove(&path, recursive),
        GuestRequest::Ping
        | GuestRequest::Resync { .. }
        | GuestRequest::Probe { .. }
        | GuestRequest::Exec(_)
        | GuestRequest::SignalGroup { .. }
        | GuestRequest::Shutdown { .. }
        | GuestRequest::Metrics => Err(misrouted().into()),
    }
}

/// A request that `serve` answers elsewhere came here: a defect, but no reason to panic.
fn misrouted() -> GuestError {
    wire::error(
        GuestErrorCode::Os,
        "the agent routed a request wrongly".to_owned(),
    )
}
