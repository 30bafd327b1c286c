//! Which system calls the process may make once the VM is built.
//!
//! Everything it needs comes by file descriptor, so making sockets and running programs are not on the list. A call
//! that is not on it ends the process. Opening a file fails without ending it: the C library's allocator tries to
//! count the processors that way.

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::collections::BTreeMap;

/// Why the process is not locked in.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The list can't be made a program.
    #[error("cannot compile the seccomp filter")]
    Compile(#[source] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("cannot apply the seccomp filter")]
    Apply(#[source] seccompiler::Error),
}

/// Allowed for every thread.
const ALLOWED: &[libc::c_long] = &[
    // Files and sockets that are open already.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    crate::sys::page_cache::SYS_CACHESTAT,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ioctl,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    // Waiting.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    // Memory and threads.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_clone3,
    libc::SYS_clone,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    libc::SYS_sched_getaffinity,
    libc::SYS_prctl,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_getrandom,
    libc::SYS_uname,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Answered with `EACCES`.
const DENIED: &[libc::c_long] = &[libc::SYS_openat];

fn program(
    numbers: &[libc::c_long],
    listed: SeccompAction,
    others: SeccompAction,
) -> Result<BpfProgram, SeccompError> {
    let rules: BTreeMap<i64, Vec<_>> = numbers.iter().map(|number| (*number, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().map_err(SeccompError::Compile)?;
    let filter = SeccompFilter::new(rules, others, listed, arch);
    filter
        .and_then(BpfProgram::try_from)
        .map_err(SeccompError::Compile)
}

/// Two programs, of whose answers the kernel takes the stricter one.
fn programs() -> Result<[BpfProgram; 2], SeccompError> {
    let eacces = SeccompAction::Errno(libc::EACCES.unsigned_abs());
    Ok([
        program(DENIED, eacces, SeccompAction::Allow)?,
        program(
            &[ALLOWED, DENIED].concat(),
            SeccompAction::Allow,
            SeccompAction::KillProcess,
        )?,
    ])
}

/// Lock in every thread of the process, and those to come.
///
/// # Errors
/// The kernel has no seccomp.
pub fn confine() -> Result<(), SeccompError> {
    for program in programs()? {
        seccompiler::apply_filter_all_threads(&program).map_err(SeccompError::Apply)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_compile_and_are_short_enough_for_the_kernel() {
        let [denied, allowed] = programs().unwrap();
        assert!(denied.len() > DENIED.len());
        assert!(allowed.len() > ALLOWED.len() && allowed.len() < 4096);
    }

    #[test]
    fn nothing_that_opens_or_runs_a_program_is_allowed() {
        for number in [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_setuid,
        ] {
            assert!(!ALLOWED.contains(&number), "{number}");
        }
    }
}
