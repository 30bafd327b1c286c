//! Fork and exec, with everything between the two that std's `Command` can't do in the right order.
//!
//! The child runs on a copy of a multi-threaded process, so between fork and exec it makes system
//! calls only: no allocation, no lock, no panic. What fails there is written to a pipe as one
//! [`Failure`]; a pipe that closes empty is a successful exec.

use nix::libc;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::unistd::{ForkResult, Gid, Uid, chdir, fork, setgroups, setresgid, setresuid, setsid};
use std::ffi::{CStr, CString, c_char};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Whom to become.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User.
    pub uid: Uid,
    /// Primary group.
    pub gid: Gid,
    /// Supplementary groups.
    pub groups: Vec<Gid>,
}

/// What to run, laid out so that the child has nothing left to compute.
#[derive(Debug)]
pub struct Program {
    /// Paths to try, in order, as `execvp` would.
    pub candidates: Vec<CString>,
    /// Arguments, the program's name first.
    pub argv: Vec<CString>,
    /// Environment.
    pub env: Vec<CString>,
    /// Working directory.
    pub cwd: CString,
    /// Whom to become; nobody else if not given.
    pub credentials: Option<Credentials>,
    /// Soft and hard limit of open files.
    pub open_files: (u64, u64),
}

/// Standard streams of the child.
#[derive(Debug)]
pub struct Streams<'a> {
    /// Descriptor 0.
    pub stdin: BorrowedFd<'a>,
    /// Descriptor 1.
    pub stdout: BorrowedFd<'a>,
    /// Descriptor 2.
    pub stderr: BorrowedFd<'a>,
    /// Descriptor 0 becomes the controlling terminal.
    pub terminal: bool,
}

/// Where a child failed before its program ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// New session, signals, streams, limits, terminal.
    Session = 1,
    /// Change of user and groups.
    User = 2,
    /// Change of directory.
    Directory = 3,
    /// No candidate could be executed.
    Exec = 4,
}

/// What failed in a child before its program ran.
#[derive(Debug)]
pub struct Failure {
    /// Where.
    pub step: Step,
    /// Why.
    pub source: io::Error,
}

/// Arrays of pointers for `execve`, made before the fork.
struct ExecVectors {
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// Fork; the child becomes `program` or reports to `report` why not. Returns the child's PID.
pub fn fork_exec(program: &Program, streams: &Streams<'_>, report: &OwnedFd) -> io::Result<i32> {
    let vectors = ExecVectors {
        argv: pointers(&program.argv),
        env: pointers(&program.env),
    };
    // SAFETY: the child calls `run_child` only, which makes system calls and neither allocates nor
    // takes a lock, and then execs or exits without unwinding.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            let (step, errno) = run_child(program, &vectors, streams);
            let [a, b, c, d] = (errno as i32).to_le_bytes();
            let _ = nix::unistd::write(report.as_fd(), &[step as u8, a, b, c, d]);
            // SAFETY: _exit ends the process at once, which is what a child that can't exec must do.
            unsafe { libc::_exit(127) }
        }
    }
}

/// Wait until a child has become its program (`None`) or has said why not.
pub fn read_report(report: OwnedFd) -> io::Result<Option<Failure>> {
    let mut bytes = Vec::with_capacity(5);
    std::fs::File::from(report).take(5).read_to_end(&mut bytes)?;
    let [step, a, b, c, d] = bytes[..] else {
        return Ok(None);
    };
    let step = match step {
        2 => Step::User,
        3 => Step::Directory,
        4 => Step::Exec,
        _ => Step::Session,
    };
    Ok(Some(Failure {
        step,
        source: io::Error::from_raw_os_error(i32::from_le_bytes([a, b, c, d])),
    }))
}

type ChildError = (Step, nix::errno::Errno);

/// Everything between fork and exec; returns only if something failed.
fn run_child(program: &Program, vectors: &ExecVectors, streams: &Streams<'_>) -> ChildError {
    if let Err(error) = enter_session(program, streams) {
        return (Step::Session, error);
    }
    if let Some(credentials) = &program.credentials
        && let Err(error) = become_user(credentials)
    {
        return (Step::User, error);
    }
    if let Err(error) = chdir(program.cwd.as_c_str()) {
        return (Step::Directory, error);
    }
    (Step::Exec, exec_first(&program.candidates, vectors))
}

fn enter_session(program: &Program, streams: &Streams<'_>) -> nix::Result<()> {
    setsid()?;
    nix::unistd::dup2_stdin(streams.stdin)?;
    nix::unistd::dup2_stdout(streams.stdout)?;
    nix::unistd::dup2_stderr(streams.stderr)?;
    if streams.terminal {
        // SAFETY: descriptor 0 was opened by the dup2 above, and TIOCSCTTY takes a number.
        let rc = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) };
        nix::errno::Errno::result(rc)?;
    }
    setrlimit(
        Resource::RLIMIT_NOFILE,
        program.open_files.0,
        program.open_files.1,
    )?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    for number in Signal::iterator() {
        // SAFETY: no handler is installed, only the default action that Rust's runtime (SIGPIPE) or
        // whoever started the agent may have taken away. SIGKILL and SIGSTOP refuse, and need none.
        let _ = unsafe { signal(number, SigHandler::SigDfl) };
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

fn become_user(credentials: &Credentials) -> nix::Result<()> {
    setgroups(&credentials.groups)?;
    setresgid(credentials.gid, credentials.gid, credentials.gid)?;
    setresuid(credentials.uid, credentials.uid, credentials.uid)
}

/// Try each path like `execvp`: go on past what is not there, prefer "permission denied" over that.
fn exec_first(candidates: &[CString], vectors: &ExecVectors) -> nix::errno::Errno {
    use nix::errno::Errno;
    let mut denied = false;
    for candidate in candidates {
        match exec(candidate, vectors) {
            Errno::EACCES => denied = true,
            Errno::ENOENT | Errno::ENOTDIR => {}
            error => return error,
        }
    }
    if denied { Errno::EACCES } else { Errno::ENOENT }
}

fn exec(path: &CStr, vectors: &ExecVectors) -> nix::errno::Errno {
    // SAFETY: path, argv and env are NUL-terminated strings and null-terminated arrays of them, alive
    // in this process until execve replaces it.
    unsafe { libc::execve(path.as_ptr(), vectors.argv.as_ptr(), vectors.env.as_ptr()) };
    nix::errno::Errno::last()
}
