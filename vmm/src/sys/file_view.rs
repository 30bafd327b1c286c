//! A file's bytes where they are, in the page cache.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A read-only mapping of a part of a file that nobody changes while it is looked at.
///
/// A byte that the page cache does not hold is read from the disk when it is touched, and a failure of that is a SIGBUS: for
/// what was found cached just before.
#[derive(Debug)]
pub struct FileView {
    start: *mut libc::c_void,
    len: usize,
}

// SAFETY: the mapping is read-only and belongs to the value.
unsafe impl Send for FileView {}
// SAFETY: as above.
unsafe impl Sync for FileView {}

impl FileView {
    /// Map bytes of a file; `from` is a multiple of the page size.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn new(file: BorrowedFd<'_>, from: u64, len_bytes: u64) -> io::Result<Self> {
        let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(len_bytes).map_err(invalid)?;
        let from = libc::off_t::try_from(from).map_err(invalid)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                from,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, len })
    }

    /// Bytes, counted from where the mapping begins; none if it has not all of them.
    #[must_use]
    pub fn bytes(&self, range: Range<u64>) -> Option<&[u8]> {
        let start = usize::try_from(range.start).ok()?;
        let end = usize::try_from(range.end).ok()?;
        if start > end || end > self.len {
            return None;
        }
        let first = self.start.cast::<u8>().wrapping_add(start);
        // SAFETY: the range lies in the mapping, which lives as long as `self`; an image is written by nobody but the one
        // process that it was handed to, so its bytes don't change meanwhile.
        Some(unsafe { std::slice::from_raw_parts(first, end - start) })
    }
}

impl Drop for FileView {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn a_view_shows_the_file_and_nothing_past_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[[1; 4096], [2; 4096], [3; 4096]].concat())
            .unwrap();
        let view = FileView::new(file.as_fd(), 4096, 8192).unwrap();
        assert_eq!(view.bytes(4096..8192).unwrap(), [3; 4096]);
        assert_eq!(view.bytes(1..3).unwrap(), [2, 2]);
        assert!(view.bytes(4096..8193).is_none() && view.bytes(0..u64::MAX).is_none());
    }
}
