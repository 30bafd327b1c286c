//! The main thread: signals, reaping, and the end.
//!
//! SIGCHLD reaps. SIGTERM and SIGINT (which is what ctrl-alt-del becomes) end the machine if this is
//! init, and the agent otherwise. A shutdown request ends the machine in either case.

use crate::config::Config;
use crate::init;
use crate::log::{self, Level};
use crate::serve::Server;
use crate::shutdown::Ending;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::sync::Arc;

/// Block the signals that the main thread handles, in this thread and all that it will start.
pub fn take_signals() -> io::Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(SignalFd::with_flags(
        &signals,
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?)
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Terminate,
    Interrupt,
}

/// Owns the signals and the end of the process.
pub struct Supervisor {
    signals: SignalFd,
    server: Arc<Server>,
}

impl Supervisor {
    /// Not running yet.
    pub fn new(signals: SignalFd, server: Arc<Server>) -> Self {
        Self { signals, server }
    }

    /// Supervise until the end: of the machine as init, of the agent as a service.
    pub fn run(self, config: &Config) -> ExitCode {
        loop {
            // The end of this thread would be the end of the machine.
            if let Ok(Some(code)) = catch_unwind(AssertUnwindSafe(|| self.step(config))) {
                return code;
            }
        }
    }

    fn step(&self, config: &Config) -> Option<ExitCode> {
        let mut fds = [
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.server.shutdown.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::NONE);
        let asked = self.read_signals();
        self.server.execs.children.reap();
        match (config.init, self.server.shutdown.ending(), asked) {
            (_, None, None) => return None,
            (false, None, Some(_)) => return Some(ExitCode::SUCCESS),
            (false, Some(ending), _) => return Some(delegate(config, ending)),
            (true, Some(ending), _) => self.halt(ending),
            (true, None, Some(Asked::Terminate)) => self.halt(Ending::PowerOff),
            (true, None, Some(Asked::Interrupt)) => self.halt(Ending::Reboot),
        }
        None
    }

    /// Read all that are queued: a SIGCHLD may stand for many children, but never hides the others.
    fn read_signals(&self) -> Option<Asked> {
        let mut asked = None;
        while let Ok(Some(info)) = self.signals.read_signal() {
            match i32::try_from(info.ssi_signo) {
                Ok(libc::SIGTERM) => asked = Some(Asked::Terminate),
                Ok(libc::SIGINT) => asked = Some(Asked::Interrupt),
                _ => {}
            }
        }
        asked
    }

    fn halt(&self, ending: Ending) {
        self.server.shutdown.throw(ending);
        init::halt(ending, &self.server.execs.children, &self.signals);
        // The kernel refused to end the machine. PID 1 must stay, and reap; without the listener's
        // event, which is spent, it waits for signals only.
        loop {
            let _ = poll(
                &mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)],
                PollTimeout::NONE,
            );
            self.read_signals();
            self.server.execs.children.reap();
        }
    }
}

/// Have the other init end the machine. The agent's end comes with it.
fn delegate(config: &Config, ending: Ending) -> ExitCode {
    use std::os::unix::process::CommandExt;
    let program = match ending {
        Ending::PowerOff => &config.poweroff,
        Ending::Reboot => &config.reboot,
    };
    let mut unblocked = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        unblocked.add(signal);
    }
    let _ = unblocked.thread_unblock();
    // In the agent's place: nothing of it is needed any more.
    let error = Command::new(program).exec();
    log::line(Level::Error, format_args!("cannot run {program}: {error}"));
    ExitCode::FAILURE
}
