//! Which pages of our own address space are present, and whether they are memory of their own: `PAGEMAP_SCAN`
//! (Linux 6.7), or `/proc/self/pagemap`. Pages of a privately mapped file become our own once they were written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const REGIONS_PER_SCAN: usize = 4096;
const PAGE: u64 = 4096;
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
#[repr(C)]
#[derive(Clone, Copy)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}
const _: () = assert!(size_of::<ScanArg>() == 96);
const _: () = assert!(size_of::<Region>() == 24);
const _: () = assert!(PAGEMAP_SCAN == (3 << 30) | (96 << 16) | (0x66 << 8) | 16);

/// Pages that are present, or swapped out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Present {
    /// Which, counted from where the question began.
    pub pages: Range<u64>,
    /// They are this process's alone, and not a file's.
    pub own: bool,
}

/// The page map of this process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Open it; to be done before the process locks itself in.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            file: File::open("/proc/self/pagemap")?,
        })
    }

    /// Pages that are present or swapped out, in order.
    ///
    /// # Errors
    /// Neither way works.
    pub fn present(&self, start: u64, len: u64) -> io::Result<Vec<Present>> {
        match self.scan(start, len) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                self.read_entries(start, len)
            }
            result => result,
        }
    }

    fn scan(&self, start: u64, len: u64) -> io::Result<Vec<Present>> {
        let mut regions = vec![
            Region {
                start: 0,
                end: 0,
                categories: 0
            };
            REGIONS_PER_SCAN
        ];
        let mut found = Vec::new();
        let end = start + len;
        let mut from = start;
        while from < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: 0,
                start: from,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: 0,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_FILE,
            };
            // SAFETY: `arg` is the structure of this ioctl, and names `regions` with its true length.
            let rc = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let Ok(n) = usize::try_from(rc) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            let told = &regions[..n.min(REGIONS_PER_SCAN)];
            for region in told {
                let pages = (region.start - start) / PAGE..(region.end - start) / PAGE;
                push(&mut found, pages, region.categories & PAGE_IS_FILE == 0);
            }
            // Not from `walk_end`: if there are more than 512 regions, Linux (6.12, 6.18) leaves it where the last of its own
            // buffers was full, and would tell of what comes after that once more.
            from = match told.last() {
                Some(last) if told.len() == REGIONS_PER_SCAN => last.end,
                _ => end,
            };
        }
        Ok(found)
    }

    fn read_entries(&self, start: u64, len: u64) -> io::Result<Vec<Present>> {
        let n_pages = len / PAGE;
        let mut found = Vec::new();
        let mut buffer = vec![0u8; 64 << 10];
        let mut page = 0;
        while page < n_pages {
            let wanted = usize::try_from((n_pages - page) * 8)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            self.file
                .read_exact_at(&mut buffer[..wanted], (start / PAGE + page) * 8)?;
            for entry in buffer[..wanted].chunks_exact(8) {
                let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
                if entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 {
                    push(&mut found, page..page + 1, entry & ENTRY_FILE == 0);
                }
                page += 1;
            }
        }
        Ok(found)
    }
}

/// Add pages behind all others, joined to the last ones if they follow those and are of the same kind.
fn push(found: &mut Vec<Present>, pages: Range<u64>, own: bool) {
    match found.last_mut() {
        Some(last) if last.pages.end == pages.start && last.own == own => last.pages.end = pages.end,
        _ => found.push(Present { pages, own }),
    }
}
