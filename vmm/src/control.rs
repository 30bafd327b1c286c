//! The control connection: datagrams in, calls on the machine, datagrams out.
//!
//! One thread, the process's main one, waits for the listener, the connection and what other threads report. A
//! new connection replaces the old one. A lost connection changes nothing for the guest.

use crate::sys::process;
use crate::vm::{Files, Prepared, RestoreRequest, Vm, VmError, VmEvent, chain};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use torpor_api::vmm::{
    Event, ExitReason, FdRole, Message, Outcome, Reply, Request, RequestFrame, Shape, VmmError, VmmErrorCode,
    VmmState,
};
use torpor_ipc::IpcError;
use vmm_sys_util::eventfd::EventFd;

/// Exit code after a page could not be given to the guest.
const EXIT_MEMORY: i32 = 3;

/// Why the VMM can't be driven any more.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The listener is not one.
    #[error("cannot accept control connections")]
    Accept(#[source] IpcError),
    /// Waiting failed.
    #[error("cannot wait for control connections")]
    Poll(#[source] nix::Error),
    /// No event descriptor.
    #[error("cannot create an event descriptor")]
    EventFd(#[source] std::io::Error),
}

/// Whether the process locks itself in once the VM is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confinement {
    /// By a seccomp filter on all threads.
    Seccomp,
    /// Not at all, for debugging.
    None,
}

/// The connection's sending side, shared with threads that must tell something before the process ends.
#[derive(Debug, Default, Clone)]
struct Peer {
    socket: Arc<Mutex<Option<Arc<OwnedFd>>>>,
}

impl Peer {
    fn replace(&self, socket: Option<Arc<OwnedFd>>) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }

    fn send(&self, message: &Message) {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(socket) = socket else {
            tracing::warn!(?message, "nobody to tell");
            return;
        };
        match serde_json::to_vec(message) {
            Ok(bytes) => {
                if let Err(error) = torpor_ipc::send(&*socket, &bytes, &[]) {
                    tracing::warn!(%error, "cannot send on the control connection");
                }
            }
            Err(error) => tracing::error!(%error, "cannot encode a message"),
        }
    }
}

enum Stage {
    Blank,
    Prepared(Box<Prepared>),
    Live(Box<Vm>),
    /// Boot or restore failed.
    Spent,
}

struct Control {
    listener: OwnedFd,
    connection: Option<Arc<OwnedFd>>,
    peer: Peer,
    stage: Stage,
    events: Receiver<VmEvent>,
    wake: EventFd,
    report: crate::vm::EventSink,
    confinement: Confinement,
}

/// Serve until told to quit or the guest ends; the process's exit code.
///
/// # Errors
/// The listener is unusable.
pub fn serve(listener: OwnedFd, confinement: Confinement) -> Result<i32, ControlError> {
    let wake = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(ControlError::EventFd)?;
    let ring = wake.try_clone().map_err(ControlError::EventFd)?;
    let (sender, events) = channel();
    let report = Arc::new(move |event| {
        if sender.send(event).is_ok() {
            // Fails only if 2^64 events wait.
            let _ = ring.write(1);
        }
    });
    let mut control = Control {
        listener,
        connection: None,
        peer: Peer::default(),
        stage: Stage::Blank,
        events,
        wake,
        report,
        confinement,
    };
    loop {
        if let Some(code) = control.turn()? {
            return Ok(code);
        }
    }
}

impl Control {
    /// Wait for something and do it; an exit code ends the process.
    fn turn(&mut self) -> Result<Option<i32>, ControlError> {
        let (accept, report, request) = self.wait()?;
        if report {
            let _ = self.wake.read();
            while let Ok(event) = self.events.try_recv() {
                if let Some(code) = self.report(event) {
                    return Ok(Some(code));
                }
            }
        }
        if accept {
            match torpor_ipc::accept(&self.listener) {
                Ok(socket) => self.connect(Some(Arc::new(socket))),
                Err(error) if listener_is_unusable(&error) => return Err(ControlError::Accept(error)),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "cannot accept a control connection");
                    if lacks_descriptors(&error) {
                        // The old one was to be replaced anyway, and leaves its descriptor to the new one.
                        self.connect(None);
                    }
                }
            }
            // What the old connection still had to say is not heard: its sender was replaced.
            return Ok(None);
        }
        Ok(if request { self.receive() } else { None })
    }

    fn connect(&mut self, socket: Option<Arc<OwnedFd>>) {
        self.peer.replace(socket.clone());
        self.connection = socket;
    }

    fn wait(&self) -> Result<(bool, bool, bool), ControlError> {
        let wake = process::as_fd(&self.wake);
        let mut fds = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(wake, PollFlags::POLLIN),
        ];
        fds.extend(
            self.connection
                .as_ref()
                .map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)),
        );
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(ControlError::Poll(error)),
                Ok(_) => break,
            }
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(false));
        Ok((ready(0), ready(1), ready(2)))
    }

    fn receive(&mut self) -> Option<i32> {
        let socket = Arc::clone(self.connection.as_ref()?);
        let datagram = match torpor_ipc::receive(&*socket) {
            Ok(datagram) => datagram,
            Err(IpcError::WouldBlock) => return None,
            Err(error) => {
                if !matches!(error, IpcError::Closed) {
                    tracing::warn!(%error, "control connection lost");
                }
                self.connect(None);
                return None;
            }
        };
        let frame: RequestFrame = match serde_json::from_slice(&datagram.bytes) {
            Ok(frame) => frame,
            Err(error) => {
                self.refuse_unreadable(&datagram.bytes, &error);
                return None;
            }
        };
        let quit = matches!(frame.request, Request::Quit);
        let result = if frame.fds.len() == datagram.fds.len() {
            let fds = frame.fds.into_iter().zip(datagram.fds).collect();
            self.handle(frame.request, Files::new(fds))
                .map_err(|error| VmmError::from(&error))
        } else {
            Err(VmmError {
                code: VmmErrorCode::BadRequest,
                message: format!("{} roles for {} descriptors", frame.fds.len(), datagram.fds.len()),
            })
        };
        let outcome = match result {
            Ok(reply) => Outcome::Ok(reply),
            Err(error) => Outcome::Err(error),
        };
        self.peer.send(&Message::Reply {
            id: frame.id,
            outcome,
        });
        quit.then_some(0)
    }

    /// Whoever sent it waits for an answer: by number if it has one, or else by the end of the connection.
    fn refuse_unreadable(&mut self, bytes: &[u8], error: &serde_json::Error) {
        #[derive(serde::Deserialize)]
        struct Numbered {
            id: u64,
        }
        tracing::error!(%error, "unreadable request");
        match serde_json::from_slice(bytes) {
            Ok(Numbered { id }) => self.peer.send(&Message::Reply {
                id,
                outcome: Outcome::Err(VmmError {
                    code: VmmErrorCode::BadRequest,
                    message: format!("cannot read the request: {error}"),
                }),
            }),
            Err(_) => self.connect(None),
        }
    }

    fn handle(&mut self, request: Request, mut files: Files) -> Result<Reply, VmError> {
        match request {
            Request::Prepare { shape } => self.prepare(shape),
            Request::Boot {
                cmdline,
                console_limit,
            } => self.boot(files, &cmdline, console_limit),
            Request::Restore {
                console_limit,
                generation,
                disk_generation,
                fork,
            } => {
                let request = RestoreRequest {
                    console_limit,
                    generation,
                    disk_generation,
                    fork,
                };
                self.restore(files, request)
            }
            Request::Freeze => Ok(Reply::Frozen {
                freeze_us: self.live("freeze")?.freeze()?,
            }),
            Request::Persist { generation } => {
                let target = files.take_image()?;
                self.live("persist")?
                    .persist(target, generation)
                    .map(|()| Reply::Done)
            }
            Request::PreCopy => {
                let target = files.take_image()?;
                self.live("copy ahead")?.pre_copy(target).map(|()| Reply::Done)
            }
            Request::Run => {
                let (persist_cancelled, run_us) = self.live("run")?.run()?;
                Ok(Reply::Ran {
                    persist_cancelled,
                    run_us,
                })
            }
            Request::Doze { generation } => {
                let (image, on_failure) = (files.take_image()?, memory_failure(self.peer.clone()));
                self.live("give back the memory of")?
                    .doze(image, generation, on_failure)
                    .map(|()| Reply::Done)
            }
            Request::Resume => Ok(Reply::Ran {
                persist_cancelled: false,
                run_us: self.live("resume")?.resume()?,
            }),
            Request::FirstByte => {
                self.live("mark the first byte of")?.first_byte();
                Ok(Reply::Done)
            }
            Request::Dump => {
                let target = File::from(files.take(FdRole::Dump)?);
                self.live("dump")?.dump(target).map(|()| Reply::Done)
            }
            Request::Status => Ok(self.status()),
            Request::Quit => Ok(Reply::Done),
        }
    }

    fn prepare(&mut self, shape: Shape) -> Result<Reply, VmError> {
        if !matches!(self.stage, Stage::Blank) {
            return Err(self.refused("prepare"));
        }
        let prepared = Prepared::build(shape, Arc::clone(&self.report))?;
        if self.confinement == Confinement::Seccomp {
            crate::seccomp::confine()?;
        }
        self.stage = Stage::Prepared(Box::new(prepared));
        Ok(Reply::Done)
    }

    fn boot(&mut self, files: Files, cmdline: &str, console_limit: u64) -> Result<Reply, VmError> {
        let vm = self.take_prepared("boot")?.boot(files, cmdline, console_limit)?;
        self.stage = Stage::Live(Box::new(vm));
        Ok(Reply::Done)
    }

    fn restore(&mut self, files: Files, request: RestoreRequest) -> Result<Reply, VmError> {
        let on_failure = memory_failure(self.peer.clone());
        let prepared = self.take_prepared("restore")?;
        let (vm, trace) = prepared.restore(files, request, on_failure)?;
        self.stage = Stage::Live(Box::new(vm));
        Ok(Reply::Restored { trace })
    }

    fn state(&self) -> VmmState {
        match &self.stage {
            Stage::Live(vm) => vm.state(),
            Stage::Spent => VmmState::Exited,
            Stage::Blank | Stage::Prepared(_) => VmmState::Blank,
        }
    }

    fn refused(&self, operation: &'static str) -> VmError {
        VmError::NotInThisState {
            operation,
            state: self.state(),
        }
    }

    fn live(&mut self, operation: &'static str) -> Result<&mut Vm, VmError> {
        let refused = self.refused(operation);
        match &mut self.stage {
            Stage::Live(vm) => Ok(vm),
            _ => Err(refused),
        }
    }

    fn take_prepared(&mut self, operation: &'static str) -> Result<Box<Prepared>, VmError> {
        let refused = self.refused(operation);
        match std::mem::replace(&mut self.stage, Stage::Spent) {
            Stage::Prepared(prepared) => Ok(prepared),
            stage => {
                self.stage = stage;
                Err(refused)
            }
        }
    }

    fn status(&self) -> Reply {
        let (shape, persisted, counters) = match &self.stage {
            Stage::Live(vm) => (Some(vm.shape()), vm.persisted(), vm.counters()),
            Stage::Prepared(prepared) => (Some(prepared.shape()), None, Default::default()),
            Stage::Blank | Stage::Spent => (None, None, Default::default()),
        };
        Reply::Status {
            state: self.state(),
            shape,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            persisted,
            counters,
        }
    }

    /// Something happened by itself; an exit code if the process is to end.
    fn report(&mut self, event: VmEvent) -> Option<i32> {
        let Stage::Live(vm) = &mut self.stage else {
            return None;
        };
        let reason = match event {
            VmEvent::PersistEnded { job, result } => match vm.persist_ended(job, result) {
                Ok(None) => return None,
                Ok(Some(Ok(stats))) => {
                    self.tell(Event::PersistDone { stats });
                    return None;
                }
                Ok(Some(Err(error))) => {
                    self.tell(Event::PersistFailed {
                        error: VmmError::from(&error),
                    });
                    return None;
                }
                Err(error) => ExitReason::Failed {
                    message: chain(&error),
                },
            },
            VmEvent::PreCopyEnded { job, result } => {
                vm.pre_copy_ended(job, result);
                return None;
            }
            VmEvent::GuestEnded(reason) => {
                vm.end();
                reason
            }
        };
        let code = i32::from(matches!(reason, ExitReason::Failed { .. }));
        self.tell(Event::Exited { reason });
        Some(code)
    }

    fn tell(&self, event: Event) {
        self.peer.send(&Message::Event { event });
    }
}

/// Whether no later accept can do better, in contrast to one for which descriptors or memory were lacking.
fn listener_is_unusable(error: &IpcError) -> bool {
    matches!(
        error,
        IpcError::Os {
            source: Errno::EBADF | Errno::EINVAL | Errno::ENOTSOCK | Errno::EOPNOTSUPP,
            ..
        }
    )
}

fn lacks_descriptors(error: &IpcError) -> bool {
    matches!(
        error,
        IpcError::Os {
            source: Errno::EMFILE | Errno::ENFILE,
            ..
        }
    )
}

/// The guest must not see a wrong page: tell, and end the process without letting any thread go on.
fn memory_failure(peer: Peer) -> crate::memory::lazy::FailureSink {
    Box::new(move |error| {
        let message = chain(&error);
        tracing::error!(message, "guest memory is lost");
        peer.send(&Message::Event {
            event: Event::Exited {
                reason: ExitReason::Memory { message },
            },
        });
        process::exit_now(EXIT_MEMORY)
    })
}

#[cfg(test)]
mod tests;
