//! Signals to groups, reaping, and what the process asks of libc and kernel for itself.

use super::checked;
use super::spawn::Credentials;
use nix::libc;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Send a signal to a process group; real-time signals too, which nix has no names for.
pub fn signal_group(pgid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: killpg takes plain numbers and touches no memory.
    checked(unsafe { libc::killpg(pgid, signal) }).map(drop)
}

/// Send a signal to every process but this one and, in PID 1's place, to no kernel thread.
pub fn signal_everybody(signal: i32) -> io::Result<()> {
    // SAFETY: kill takes plain numbers and touches no memory.
    checked(unsafe { libc::kill(-1, signal) }).map(drop)
}

/// A child that ended, taken from the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Reaped {
    /// Its PID.
    pub pid: i32,
    /// Exit code, or 128 + signal.
    pub code: i32,
}

/// What is there to reap right now.
#[derive(Debug, Clone, Copy)]
pub enum Reap {
    /// This one ended.
    Ended(Reaped),
    /// Children exist, none has ended.
    AllRunning,
    /// There is no child at all.
    NoChildren,
}

/// Reap one child that has ended, without waiting.
pub fn reap() -> Reap {
    let mut status: libc::c_int = 0;
    // SAFETY: waitpid writes one int to `status`, which outlives the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    match pid {
        0 => Reap::AllRunning,
        pid if pid > 0 => {
            let status = ExitStatus::from_raw(status);
            let code = status
                .code()
                .or(status.signal().map(|signal| 128 + signal))
                .unwrap_or(255);
            Reap::Ended(Reaped { pid, code })
        }
        _ => Reap::NoChildren,
    }
}

/// Take on a user's rights on the calling thread alone, for good. libc's own functions would change every thread.
pub fn become_on_this_thread(credentials: &Credentials) -> io::Result<()> {
    let (uid, gid) = (credentials.uid.as_raw(), credentials.gid.as_raw());
    let groups: Vec<libc::gid_t> = credentials.groups.iter().map(|gid| gid.as_raw()).collect();
    let changed = |rc: libc::c_long| {
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    // SAFETY: setgroups reads as many IDs as it is told, and the vector has as many.
    changed(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: setresgid takes plain numbers and touches no memory.
    changed(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: setresuid takes plain numbers and touches no memory.
    changed(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

/// One malloc arena for all threads: an arena per thread is pages that every wake would have to touch.
pub fn use_one_malloc_arena() {
    // SAFETY: mallopt takes plain numbers; it is called before any thread is started.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Let no descriptor that was inherited reach the processes that are started here.
pub fn close_inherited_on_exec() -> io::Result<()> {
    let flags = libc::c_int::try_from(libc::CLOSE_RANGE_CLOEXEC).unwrap_or(0);
    // SAFETY: with CLOSE_RANGE_CLOEXEC nothing is closed, only flags change, so no owner of a
    // descriptor is affected.
    checked(unsafe { libc::close_range(3, libc::c_uint::MAX, flags) }).map(drop)
}
