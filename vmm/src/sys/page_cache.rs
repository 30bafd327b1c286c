//! How much of a file the page cache holds: `cachestat` (Linux 6.5).

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The same number on every architecture; the libc crate has no name for it yet.
pub const SYS_CACHESTAT: libc::c_long = 451;

#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}
const _: () = assert!(size_of::<CachestatRange>() == 16);
const _: () = assert!(size_of::<Cachestat>() == 40);

/// Pages of the cache that bytes of a file are in.
///
/// # Errors
/// The kernel has no such call, or refuses it for this file.
pub fn cached_pages(file: BorrowedFd<'_>, bytes: Range<u64>) -> io::Result<u64> {
    let range = CachestatRange {
        off: bytes.start,
        len: bytes.end.saturating_sub(bytes.start),
    };
    let mut found = Cachestat::default();
    // SAFETY: both structures are the call's, as asserted above, and outlive it.
    let rc = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut found,
            0,
        )
    };
    if rc == 0 {
        Ok(found.nr_cache)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn what_was_just_written_is_cached() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 5 * 4096]).unwrap();
        assert_eq!(cached_pages(file.as_fd(), 4096..3 * 4096).unwrap(), 2);
    }
}
