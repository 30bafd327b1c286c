//! The signal that takes a vCPU thread out of `KVM_RUN`, the end of the process, and random bytes.

use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

extern "C" fn nothing(_: libc::c_int) {}

/// Give the kick signal a handler that does nothing: its delivery is what interrupts the ioctl.
///
/// # Errors
/// The kernel refused.
pub fn install_kick_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: `action` is initialised, its handler is async-signal-safe because it does nothing.
    let rc = unsafe { libc::sigaction(libc::SIGRTMIN(), &raw const action, std::ptr::null_mut()) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Interrupt a thread's system call.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: the handle is not joined yet, so the pthread_t names a thread that exists.
    let rc = unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGRTMIN()) };
    debug_assert!(rc == 0 || rc == libc::ESRCH, "pthread_kill: {rc}");
}

/// End the process now, without destructors or exit handlers: another thread may be in any state.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes any code and has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Random bytes from the kernel.
///
/// # Errors
/// The kernel refused, which it does not after boot.
pub fn random_bytes() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    // SAFETY: the buffer has the length that is given.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(n) == Ok(bytes.len()) {
        Ok(bytes)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Have all threads allocate from one heap: one of a thread's own is 128 MiB of address space to map and some pages to touch when
/// it starts, on the path of a wake, too, and no thread here allocates so often that it would wait for another.
pub fn use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number that malloc reads when a thread first allocates.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Give memory that was freed back to the kernel: what a restore took for a moment the process would keep for good.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing that is allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// An event descriptor, borrowed.
#[must_use]
pub fn as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event`, whose borrow the result carries.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The control socket that torpord left us as [`torpor_api::vmm::LISTEN_FD`], close-on-exec from now on.
///
/// # Errors
/// Nothing that listens is open there.
pub fn inherited_listener() -> io::Result<OwnedFd> {
    let fd = torpor_api::vmm::LISTEN_FD;
    // SAFETY: fcntl on any number is sound; it fails if nothing is open there.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the contract with torpord it is ours; nothing else in the process has it,
    // because this is called once, at the start.
    let listener = unsafe { OwnedFd::from_raw_fd(fd) };
    if getsockopt(&listener, AcceptConn)? {
        Ok(listener)
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}
