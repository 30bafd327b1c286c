//! Starting a process with pipes or a terminal, and the agent's ends of those.
//!
//! The agent's ends are non-blocking; the process's ends close here as soon as it runs.

use super::command::Command;
use super::{ExecError, Execs};
use crate::children::Child;
use crate::sys::spawn::Streams;
use crate::sys::terminal;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use torpor_api::guest::{FrameType, WindowSize};

/// The agent's ends of a process's streams.
pub struct ProcessStreams {
    /// To its standard input or its terminal; gone once it wants or gets no more.
    pub input: Option<File>,
    /// From it; each is gone once it is read to its end.
    pub outputs: Vec<Output>,
    /// Its terminal, if it has one.
    pub controller: Option<OwnedFd>,
}

/// A stream from the process.
pub struct Output {
    /// The agent's end.
    pub file: File,
    /// What its bytes are sent as.
    pub kind: FrameType,
    /// After the grace: how much is still to be read.
    pub owed_bytes: Option<usize>,
}

impl Output {
    fn new(fd: OwnedFd, kind: FrameType) -> Self {
        Self {
            file: File::from(fd),
            kind,
            owed_bytes: None,
        }
    }
}

/// Start a process with a pipe for each stream.
pub fn start_with_pipes(
    execs: &Execs,
    command: &Command,
    with_input: bool,
) -> Result<(Arc<Child>, ProcessStreams), ExecError> {
    let pipe = || {
        pipe2(OFlag::O_CLOEXEC)
            .map_err(io::Error::from)
            .map_err(ExecError::os("make a pipe"))
    };
    let (out, child_out) = pipe()?;
    let (err, child_err) = pipe()?;
    let (child_in, input) = if with_input {
        let (child_in, input) = pipe()?;
        (child_in, Some(input))
    } else {
        (
            OwnedFd::from(File::open("/dev/null").map_err(ExecError::os("open /dev/null"))?),
            None,
        )
    };
    for fd in [Some(&out), Some(&err), input.as_ref()].into_iter().flatten() {
        fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(io::Error::from)
            .map_err(ExecError::os("make a pipe non-blocking"))?;
    }
    let streams = Streams {
        stdin: child_in.as_fd(),
        stdout: child_out.as_fd(),
        stderr: child_err.as_fd(),
        terminal: false,
    };
    let child = execs.start(&command.program, &streams)?;
    // Of two that are ready together the last is read first.
    let outputs = vec![
        Output::new(err, FrameType::Stderr),
        Output::new(out, FrameType::Stdout),
    ];
    Ok((
        child,
        ProcessStreams {
            input: input.map(File::from),
            outputs,
            controller: None,
        },
    ))
}

/// Start a process on a terminal of its own.
pub fn start_under_terminal(
    execs: &Execs,
    command: &Command,
    size: WindowSize,
) -> Result<(Arc<Child>, ProcessStreams), ExecError> {
    let pty = terminal::open_pty(size).map_err(ExecError::os("open a terminal"))?;
    let duplicate = || {
        pty.controller
            .try_clone()
            .map_err(ExecError::os("duplicate a terminal"))
    };
    let (input, output) = (duplicate()?, duplicate()?);
    // So that the user can open its terminal by name; without the right to chown it is the agent's own.
    let _ = nix::unistd::fchown(&pty.terminal, Some(command.account.credentials.uid), None);
    let terminal = pty.terminal.as_fd();
    let streams = Streams {
        stdin: terminal,
        stdout: terminal,
        stderr: terminal,
        terminal: true,
    };
    let child = execs.start(&command.program, &streams)?;
    let outputs = vec![Output::new(output, FrameType::Stdout)];
    Ok((
        child,
        ProcessStreams {
            input: Some(File::from(input)),
            outputs,
            controller: Some(pty.controller),
        },
    ))
}
