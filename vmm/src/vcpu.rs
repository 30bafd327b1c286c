//! One thread per vCPU.
//!
//! The thread owns the vCPU's descriptor and does everything with it, on command: set or save state, pre-fault,
//! run. It is parked between commands, from the moment the blank VMM is built. While the guest runs it hands
//! device accesses to the devices and what ends the guest to the [`ExitSink`].
//!
//! A run ends only between two instructions: the one that caused an exit is completed by entering KVM once more,
//! which then returns at once because the immediate-exit byte is set.

use crate::arch::{self, ArchError, BootRegisters, CpuProfile, VcpuState};
use crate::devices::DeviceSet;
use crate::layout::{I8042_COMMAND_PORT, I8042_RESET};
use crate::pm1::{Pm1, Pm1Write};
use crate::sys::kvm::{ImmediateExit, internal_error, pre_fault};
use crate::sys::process;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use torpor_api::vmm::ExitReason;

/// Told when the guest ends by itself; called from vCPU threads.
pub type ExitSink = Arc<dyn Fn(ExitReason) + Send + Sync>;

/// Why a vCPU did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM would not make it.
    #[error("cannot create vCPU {id}")]
    Create {
        /// Which.
        id: u8,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// No thread.
    #[error("cannot start the thread of vCPU {id}")]
    Thread {
        /// Which.
        id: u8,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Its state can't be set or got.
    #[error("vCPU {id} refused")]
    State {
        /// Which.
        id: u8,
        /// Why.
        #[source]
        source: ArchError,
    },
    /// The thread is gone, or answered another question: a defect.
    #[error("the thread of vCPU {id} is out of step")]
    OutOfStep {
        /// Which.
        id: u8,
    },
}

enum Command {
    Boot(BootRegisters),
    Restore(Box<VcpuState>),
    PreFault(Vec<(u64, u64)>),
    Save,
    Run,
}

enum Answer {
    Done(Result<(), ArchError>),
    Saved(Box<Result<VcpuState, ArchError>>),
    Stopped,
}

/// A vCPU, from outside of its thread.
pub struct Vcpu {
    id: u8,
    commands: Option<Sender<Command>>,
    answers: Receiver<Answer>,
    immediate_exit: ImmediateExit,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What every vCPU thread needs.
#[derive(Clone)]
pub struct VcpuContext {
    /// Indices of the MSRs to save.
    pub msr_indices: Arc<Vec<u32>>,
    /// The devices that it accesses.
    pub devices: Arc<RwLock<DeviceSet>>,
    /// The fixed ACPI registers.
    pub pm1: Arc<Pm1>,
    /// Told of the guest's end.
    pub exits: ExitSink,
}

struct Thread {
    fd: VcpuFd,
    context: VcpuContext,
    stop: Arc<AtomicBool>,
}

/// Make a vCPU and tell it what it is. The devices can come later: see [`Vcpu::start`].
///
/// # Errors
/// KVM refused.
pub fn create(vm: &VmFd, id: u8, profile: &CpuProfile) -> Result<VcpuFd, VcpuError> {
    let fd = vm
        .create_vcpu(id.into())
        .map_err(|source| VcpuError::Create { id, source })?;
    arch::configure_vcpu(&fd, profile, id).map_err(|source| VcpuError::State { id, source })?;
    Ok(fd)
}

impl Vcpu {
    /// Start its thread, parked.
    ///
    /// # Errors
    /// No thread.
    pub fn start(mut fd: VcpuFd, id: u8, context: VcpuContext) -> Result<Self, VcpuError> {
        let immediate_exit = ImmediateExit::of(&mut fd);
        let stop = Arc::new(AtomicBool::new(false));
        let (commands, inbox) = channel();
        let (outbox, answers) = channel();
        let mut thread = Thread {
            fd,
            context,
            stop: Arc::clone(&stop),
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu-{id}"))
            .spawn(move || thread.serve(&inbox, &outbox))
            .map_err(|source| VcpuError::Thread { id, source })?;
        Ok(Self {
            id,
            commands: Some(commands),
            answers,
            immediate_exit,
            stop,
            thread: Some(thread),
        })
    }

    fn command(&self, command: Command) -> Result<(), VcpuError> {
        let sent = self
            .commands
            .as_ref()
            .is_some_and(|commands| commands.send(command).is_ok());
        if sent {
            Ok(())
        } else {
            Err(VcpuError::OutOfStep { id: self.id })
        }
    }

    /// Set it to the kernel's entry point; answered by [`Self::done`].
    ///
    /// # Errors
    /// The thread is gone.
    pub fn boot(&self, registers: BootRegisters) -> Result<(), VcpuError> {
        self.command(Command::Boot(registers))
    }

    /// Set it to a saved state; answered by [`Self::done`].
    ///
    /// # Errors
    /// The thread is gone.
    pub fn restore(&self, state: VcpuState) -> Result<(), VcpuError> {
        self.command(Command::Restore(Box::new(state)))
    }

    /// Fill its page tables for ranges of guest physical addresses; answered by [`Self::done`].
    ///
    /// # Errors
    /// The thread is gone.
    pub fn pre_fault(&self, ranges: Vec<(u64, u64)>) -> Result<(), VcpuError> {
        self.command(Command::PreFault(ranges))
    }

    /// Wait for what was commanded last.
    ///
    /// # Errors
    /// KVM refused.
    pub fn done(&self) -> Result<(), VcpuError> {
        match self.answers.recv() {
            Ok(Answer::Done(result)) => result.map_err(|source| VcpuError::State { id: self.id, source }),
            _ => Err(VcpuError::OutOfStep { id: self.id }),
        }
    }

    /// Ask for its state; it must be stopped. Answered by [`Self::saved`].
    ///
    /// # Errors
    /// The thread is gone.
    pub fn save(&self) -> Result<(), VcpuError> {
        self.command(Command::Save)
    }

    /// Wait for its state.
    ///
    /// # Errors
    /// KVM refused.
    pub fn saved(&self) -> Result<VcpuState, VcpuError> {
        match self.answers.recv() {
            Ok(Answer::Saved(result)) => (*result).map_err(|source| VcpuError::State { id: self.id, source }),
            _ => Err(VcpuError::OutOfStep { id: self.id }),
        }
    }

    /// Let it run.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn run(&self) -> Result<(), VcpuError> {
        self.stop.store(false, Ordering::SeqCst);
        self.immediate_exit.set(false);
        self.command(Command::Run)
    }

    /// Tell it to stop; answered by [`Self::stopped`].
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        // First the byte, then the signal: a thread that is about to enter KVM sees the one, a thread that is
        // in it gets the other.
        self.immediate_exit.set(true);
        if let Some(thread) = &self.thread {
            process::kick(thread);
        }
    }

    /// Wait until it stands between two instructions.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn stopped(&self) -> Result<(), VcpuError> {
        match self.answers.recv() {
            Ok(Answer::Stopped) => Ok(()),
            _ => Err(VcpuError::OutOfStep { id: self.id }),
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // While the thread is certainly there: it unmaps the immediate-exit byte when it ends.
        self.request_stop();
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

enum Next {
    Continue,
    Stop,
}

impl Thread {
    fn serve(&mut self, inbox: &Receiver<Command>, outbox: &Sender<Answer>) {
        while let Ok(command) = inbox.recv() {
            let answer = match command {
                Command::Boot(registers) => Answer::Done(registers.apply(&self.fd)),
                Command::Restore(state) => Answer::Done(arch::restore_vcpu(&self.fd, &state)),
                Command::PreFault(ranges) => {
                    self.pre_fault(&ranges);
                    Answer::Done(Ok(()))
                }
                Command::Save => {
                    Answer::Saved(Box::new(arch::save_vcpu(&self.fd, &self.context.msr_indices)))
                }
                Command::Run => {
                    self.run();
                    Answer::Stopped
                }
            };
            if outbox.send(answer).is_err() {
                return;
            }
        }
    }

    fn pre_fault(&self, ranges: &[(u64, u64)]) {
        for (gpa, len_bytes) in ranges {
            if let Err(error) = pre_fault(&self.fd, *gpa, *len_bytes) {
                tracing::debug!(gpa, len_bytes, %error, "memory not pre-faulted");
                return;
            }
        }
    }

    fn run(&mut self) {
        // Tells the guest that it stood still, so that its watchdogs do not bark. Fails without a kvmclock.
        let _ = self.fd.kvmclock_ctrl();
        while let Next::Continue = self.run_once() {}
    }

    fn run_once(&mut self) -> Next {
        let devices = &self.context.devices;
        let read_devices = || devices.read().unwrap_or_else(PoisonError::into_inner);
        let end = match self.fd.run() {
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                read_devices().mmio_read(gpa, data);
                return Next::Continue;
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                read_devices().mmio_write(gpa, data);
                return Next::Continue;
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                match port {
                    // Never busy: the guest waits for that before it resets the machine.
                    I8042_COMMAND_PORT => data.fill(0),
                    port if Pm1::owns(port) => self.context.pm1.read(port, data),
                    _ => read_devices().pio_read(port, data),
                }
                return Next::Continue;
            }
            Ok(VcpuExit::IoOut(I8042_COMMAND_PORT, &[I8042_RESET])) => ExitReason::Reboot,
            Ok(VcpuExit::IoOut(port, data)) if Pm1::owns(port) => match self.context.pm1.write(port, data) {
                Pm1Write::Done => return Next::Continue,
                Pm1Write::PowerOff => ExitReason::Shutdown,
            },
            Ok(VcpuExit::IoOut(port, data)) => {
                read_devices().pio_write(port, data);
                return Next::Continue;
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => return self.interrupted(),
            Ok(VcpuExit::Shutdown) => ExitReason::Reboot,
            Ok(VcpuExit::InternalError) => {
                failed(format!("KVM internal error: {}", internal_error(&mut self.fd)))
            }
            Ok(exit) => failed(format!("unexpected exit {exit:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return self.interrupted(),
            Err(error) => failed(format!("KVM_RUN failed: {error}")),
        };
        (self.context.exits)(end);
        Next::Stop
    }

    fn interrupted(&self) -> Next {
        if self.stop.load(Ordering::SeqCst) {
            Next::Stop
        } else {
            Next::Continue
        }
    }
}

fn failed(message: String) -> ExitReason {
    ExitReason::Failed { message }
}
