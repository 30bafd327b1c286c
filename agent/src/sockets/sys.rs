//! Descriptors that systemd hands over.

use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// systemd's first descriptor.
const FIRST: RawFd = 3;

/// The descriptors from 3 on that the environment says are ours. Only the first call gets any.
pub(super) fn inherited() -> Vec<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    let is_ours = number("LISTEN_PID") == Some(std::process::id());
    if !is_ours || TAKEN.swap(true, Ordering::AcqRel) {
        return Vec::new();
    }
    let n_fds = number("LISTEN_FDS").and_then(|n_fds| RawFd::try_from(n_fds).ok());
    (FIRST..FIRST.saturating_add(n_fds.unwrap_or(0)))
        // SAFETY: systemd opened these descriptors for this process (LISTEN_PID) and nobody took them before, which
        // TAKEN sees to.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect()
}
