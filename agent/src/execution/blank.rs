//! The pool of blank VMMs: processes that have built everything of a VM but its memory.
//!
//! It holds [`BlankConfig::per_shape`] VMMs for each of the [`BlankConfig::shapes`] shapes used last. One task
//! refills it, one VMM at a time, and only after the start that emptied it is over, so that it takes no CPU from
//! a wake. An empty pool makes a start slower, never an error. A blank VMM has a run directory of its own; at the
//! next start of torpord what is still blank is ended. Which shapes are in use survives in a hint file, so that
//! the first wake after a restart finds a blank VMM, too.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use torpor_api::http::BlankVmms;
use torpor_api::limits::{MEM_MIB, VCPUS};
use torpor_api::vmm::Shape;
use torpor_api::{ErrorCode, ExecutionId};

use super::process::Process;
use super::record::{MachineRecord, Record, RunDir, RunDirError};
use crate::images::manifest;
use crate::machine::hypervisor::HypervisorError;
use crate::vmm_client::{VmmClient, VmmEvents};

/// How long the refill rests after a failure.
const REFILL_REST: Duration = Duration::from_secs(5);

/// How many blank VMMs are kept.
#[derive(Debug, Clone, Copy)]
pub struct BlankConfig {
    /// For each shape in recent use.
    pub per_shape: usize,
    /// Number of shapes.
    pub shapes: usize,
}

impl Default for BlankConfig {
    fn default() -> Self {
        Self {
            per_shape: 1,
            shapes: 4,
        }
    }
}

/// A VMM that waits for a machine. Dropping it ends the process and removes its run directory.
pub(super) struct BlankVmm {
    parts: Option<BlankParts>,
}

/// What a blank VMM is made of.
pub(super) struct BlankParts {
    pub(super) dir: RunDir,
    pub(super) process: Process,
    pub(super) client: VmmClient,
    pub(super) events: VmmEvents,
    pub(super) vsock_listener: OwnedFd,
}

impl Drop for BlankVmm {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            parts.process.kill();
            parts.dir.remove();
        }
    }
}

impl BlankVmm {
    /// Take it apart; the parts are no longer ended by a drop.
    pub(super) fn into_parts(mut self) -> Option<BlankParts> {
        self.parts.take()
    }

    /// Give it the execution's name and record whom it is to run; from now on a restarted torpord finds it.
    pub(super) fn claim(&mut self, machine: MachineRecord) -> Result<(), RunDirError> {
        let Some(parts) = &mut self.parts else {
            return Ok(());
        };
        parts.dir.claim(parts.process.id(), machine)
    }

    fn is_alive(&self) -> bool {
        let parts = self.parts.as_ref();
        parts.is_some_and(|parts| !parts.client.is_closed() && !parts.process.has_ended())
    }
}

struct Shelf {
    shape: Shape,
    blanks: Vec<BlankVmm>,
}

impl Shelf {
    fn empty(shape: Shape) -> Self {
        Self {
            shape,
            blanks: Vec::new(),
        }
    }
}

#[derive(Default)]
struct State {
    /// Most recently used first.
    shelves: VecDeque<Shelf>,
    /// Starts under way; the refill waits for them.
    starting: usize,
    closed: bool,
}

struct Shared {
    config: BlankConfig,
    vmm_path: PathBuf,
    exec_dir: PathBuf,
    hint: PathBuf,
    state: Mutex<State>,
    wanted: Notify,
    settled: Notify,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shape that lacks a blank VMM, if one may be made now.
    fn lacking(&self) -> Option<Shape> {
        let state = self.state();
        let per_shape = if state.closed || state.starting > 0 {
            0
        } else {
            self.config.per_shape
        };
        let mut shelves = state.shelves.iter();
        shelves
            .find(|shelf| shelf.blanks.len() < per_shape)
            .map(|shelf| shelf.shape)
    }
}

/// All blank VMMs of this torpord.
pub(super) struct BlankPool {
    shared: Arc<Shared>,
    refill: tokio::task::AbortHandle,
}

impl Drop for BlankPool {
    fn drop(&mut self) {
        self.refill.abort();
    }
}

/// While it lives, a start is under way.
pub(super) struct Starting(Arc<Shared>);

impl Drop for Starting {
    fn drop(&mut self) {
        self.0.state().starting -= 1;
        self.0.wanted.notify_one();
    }
}

impl BlankPool {
    /// A pool that begins with the shapes that the file `hint` names.
    pub(super) fn new(config: BlankConfig, vmm_path: PathBuf, exec_dir: PathBuf, hint: PathBuf) -> Self {
        let shelves = read_hint(&hint).into_iter().take(config.shapes).map(Shelf::empty);
        let state = State {
            shelves: shelves.collect(),
            ..State::default()
        };
        let shared = Arc::new(Shared {
            config,
            vmm_path,
            exec_dir,
            hint,
            state: Mutex::new(state),
            wanted: Notify::new(),
            settled: Notify::new(),
        });
        let refill = tokio::spawn(refill(shared.clone())).abort_handle();
        Self { shared, refill }
    }

    /// A blank VMM of this shape, and what holds the refill back until the start is over.
    pub(super) async fn take(&self, shape: Shape) -> Result<(BlankVmm, Starting), HypervisorError> {
        self.shared.state().starting += 1;
        let starting = Starting(self.shared.clone());
        // Those that died in the pool are dropped outside the lock.
        let (ready, _stale) = self.pick(shape);
        let blank = match ready {
            Some(blank) => blank,
            None => start_blank(&self.shared, shape).await?,
        };
        Ok((blank, starting))
    }

    /// The shape's live VMM if there is one; the shape becomes the most recently used.
    fn pick(&self, shape: Shape) -> (Option<BlankVmm>, Vec<BlankVmm>) {
        let mut state = self.shared.state();
        let at = state.shelves.iter().position(|shelf| shelf.shape == shape);
        let known = at.and_then(|at| state.shelves.remove(at));
        let is_new = known.is_none();
        let mut shelf = known.unwrap_or_else(|| Shelf::empty(shape));
        let (mut alive, mut stale): (Vec<_>, Vec<_>) = shelf.blanks.drain(..).partition(BlankVmm::is_alive);
        let ready = alive.pop();
        shelf.blanks = alive;
        state.shelves.push_front(shelf);
        while state.shelves.len() > self.shared.config.shapes.max(1) {
            stale.extend(
                state
                    .shelves
                    .pop_back()
                    .into_iter()
                    .flat_map(|shelf| shelf.blanks),
            );
        }
        if is_new {
            let shapes = state.shelves.iter().map(|shelf| shelf.shape).collect();
            write_hint(self.shared.hint.clone(), shapes);
        }
        (ready, stale)
    }

    /// How many there are of each shape.
    pub(super) fn counts(&self) -> Vec<BlankVmms> {
        let wanted = self.shared.config.per_shape as u64;
        let state = self.shared.state();
        let of_shelf = |shelf: &Shelf| BlankVmms {
            vcpus: shelf.shape.vcpus,
            mem_mib: shelf.shape.mem_mib,
            ready: shelf.blanks.len() as u64,
            wanted,
        };
        state.shelves.iter().map(of_shelf).collect()
    }

    /// End all blank VMMs and make no more.
    pub(super) async fn close(&self) {
        let shelves = {
            let mut state = self.shared.state();
            state.closed = true;
            std::mem::take(&mut state.shelves)
        };
        for mut blank in shelves.into_iter().flat_map(|shelf| shelf.blanks) {
            if let Some(parts) = blank.parts.take() {
                parts.process.kill();
                parts.process.ended().await;
                parts.dir.remove();
            }
        }
    }

    /// Wait until no start is under way, nor what follows it, and nothing is lacking.
    pub(super) async fn settled(&self) {
        loop {
            let settled = self.shared.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            let is_starting = self.shared.state().starting > 0;
            if !is_starting && self.shared.lacking().is_none() {
                return;
            }
            settled.await;
        }
    }
}

/// The shapes that were in use; none if the file is missing or makes no sense, since it is only a hint.
fn read_hint(path: &Path) -> Vec<Shape> {
    let json = std::fs::read(path).unwrap_or_default();
    let shapes: Vec<Shape> = serde_json::from_slice(&json).unwrap_or_default();
    let is_possible = |shape: &Shape| VCPUS.contains(&shape.vcpus) && MEM_MIB.contains(&shape.mem_mib);
    shapes.into_iter().filter(is_possible).collect()
}

fn write_hint(path: PathBuf, shapes: Vec<Shape>) {
    tokio::task::spawn_blocking(move || {
        let written = serde_json::to_vec(&shapes)
            .map_err(std::io::Error::other)
            .and_then(|json| manifest::replace(&path, &json));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "shapes in use not remembered");
        }
    });
}

async fn refill(shared: Arc<Shared>) {
    loop {
        let Some(shape) = shared.lacking() else {
            shared.settled.notify_waiters();
            shared.wanted.notified().await;
            continue;
        };
        match start_blank(&shared, shape).await {
            Ok(blank) => {
                // Nobody may want it any more; it is then dropped outside the lock.
                let _unwanted = shelve(&shared, shape, blank);
            }
            Err(error) => {
                tracing::warn!(error = super::chain(&error), "no blank VMM made");
                tokio::time::sleep(REFILL_REST).await;
            }
        }
    }
}

fn shelve(shared: &Shared, shape: Shape, blank: BlankVmm) -> Option<BlankVmm> {
    let mut state = shared.state();
    let open = !state.closed;
    match state
        .shelves
        .iter_mut()
        .find(|shelf| open && shelf.shape == shape)
    {
        Some(shelf) => {
            shelf.blanks.push(blank);
            None
        }
        None => Some(blank),
    }
}

/// Start a VMM and have it build `shape`.
async fn start_blank(shared: &Shared, shape: Shape) -> Result<BlankVmm, HypervisorError> {
    let failed = || HypervisorError::new(ErrorCode::CapacityExceeded, "cannot start a VMM");
    let name = ExecutionId::generate();
    let dir =
        RunDir::create_blank(&shared.exec_dir, name.as_str()).map_err(|error| failed().because(error))?;
    let blank = spawn(shared, dir.clone(), &name).inspect_err(|_| dir.remove())?;
    if let Some(parts) = &blank.parts
        && let Err(error) = parts.client.prepare(shape).await
    {
        let message = format!("VMM cannot prepare {shape:?} (it said: {:?})", dir.log_tail());
        return Err(HypervisorError::new(ErrorCode::CapacityExceeded, message).because(error));
    }
    Ok(blank)
}

fn spawn(shared: &Shared, dir: RunDir, name: &ExecutionId) -> Result<BlankVmm, HypervisorError> {
    let failed = || HypervisorError::new(ErrorCode::CapacityExceeded, "cannot start a VMM");
    let control = dir.listen_control().map_err(|error| failed().because(error))?;
    let vsock_listener = dir.listen_vsock().map_err(|error| failed().because(error))?;
    let log = dir.open_log().map_err(|error| failed().because(error))?;
    let process = Process::start(&shared.vmm_path, name.as_str(), control, log);
    let process = process.map_err(|error| failed().because(error))?;
    let recorded = dir.write_record(&Record::new(process.id(), None));
    let connected = recorded
        .map_err(|error| failed().because(error))
        .and_then(|()| VmmClient::connect(&dir.control_socket()).map_err(|error| failed().because(error)));
    let (client, events) = connected.inspect_err(|_| process.kill())?;
    let parts = BlankParts {
        dir,
        process,
        client,
        events,
        vsock_listener,
    };
    Ok(BlankVmm { parts: Some(parts) })
}
