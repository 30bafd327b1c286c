//! Guest RAM: one private mapping, contiguous by RAM offset, under a reservation that the memslots are bound to
//! before there is any memory. It is anonymous, but for pages of an image that were mapped before the guest ran.
//!
//! Owns the mapping, the record of pages that the guest gave back, and the way to find which pages are the guest's
//! own. [`lazy`] fills missing pages from an image, [`prefetch`] many of them at once, and `recording` finds out which
//! ones. vCPUs and devices write to RAM at any time while the guest runs, so no reference into it is ever formed:
//! everything goes through raw copies or [`GuestMemory`]'s volatile access.
//!
//! Invariants: a page is *discarded* from the moment the balloon gives it back until memory is laid out anew;
//! when absent it is zero, whatever an image says. A discarded page that the guest touches again is present,
//! and then its content counts. A page of a mapped image becomes the guest's own with the first write to it; until
//! then it is what the image holds, and nobody rewrites it there: a persist writes only pages that are the guest's.

pub mod lazy;
pub mod prefetch;
mod recording;
mod source;
mod unwatched;

pub use source::Backing;

use crate::layout::{PAGE_BYTES, PAGE_SIZE, RamLayout};
use crate::pages::runs_by;
use crate::sys::kvm::SlotMapping;
use crate::sys::pagemap::{Pagemap, Present};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

/// Guest memory as devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// What the balloon calls with guest physical address and length in bytes of pages that the guest gave back.
pub type DiscardSink = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Address space is short.
    #[error("cannot reserve {len_bytes} bytes of address space for guest memory")]
    Reserve {
        /// Wanted.
        len_bytes: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Mapping over the reservation failed.
    #[error("cannot map {len_bytes} bytes of guest memory")]
    Map {
        /// Wanted.
        len_bytes: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The regions do not fit together.
    #[error("cannot describe guest memory at {gpa:#x}: {reason}")]
    Region {
        /// First address.
        gpa: u64,
        /// Why not.
        reason: String,
    },
    /// `/proc/self/pagemap` is not there.
    #[error("cannot open the page map of the process")]
    Pagemap(#[source] io::Error),
    /// userfaultfd refused.
    #[error("cannot {operation} with userfaultfd")]
    Uffd {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No thread for the misses.
    #[error("cannot start the page fault thread")]
    Thread(#[source] io::Error),
}

/// One bit per page, set from any thread.
#[derive(Debug)]
pub struct PageBitmap {
    words: Vec<AtomicU64>,
}

impl PageBitmap {
    /// All bits clear.
    #[must_use]
    pub fn new(n_pages: u64) -> Self {
        let n_words = usize::try_from(n_pages.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            words: (0..n_words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Whether a page's bit is set; pages past the end have none.
    #[must_use]
    pub fn get(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64)
            .ok()
            .and_then(|index| self.words.get(index));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    /// Clear all bits.
    fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }

    /// Set the bits of a range.
    pub fn set(&self, pages: Range<u64>) {
        let mut page = pages.start;
        while page < pages.end {
            let bit = page % 64;
            let n_bits = (64 - bit).min(pages.end - page);
            let mask = if n_bits == 64 {
                u64::MAX
            } else {
                ((1 << n_bits) - 1) << bit
            };
            if let Some(word) = usize::try_from(page / 64)
                .ok()
                .and_then(|index| self.words.get(index))
            {
                word.fetch_or(mask, Ordering::AcqRel);
            }
            page += n_bits;
        }
    }
}

/// The RAM of the one guest of this process.
#[derive(Debug)]
pub struct Ram {
    layout: RamLayout,
    base: *mut libc::c_void,
    len: usize,
    discarded: PageBitmap,
    /// Pages under which an image was mapped: the kernel serves them, not userfaultfd.
    mapped: PageBitmap,
    /// Held while a miss is filled and while pages are discarded: a page can't come back from the image
    /// after it was given back.
    fill: Mutex<()>,
    pagemap: Pagemap,
}

// SAFETY: the pointer is an address range that belongs to this value until it is dropped; all access through
// it is by raw copies that tolerate concurrent writes by the guest.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// Reserve address space, without memory.
    ///
    /// # Errors
    /// Address space or `/proc` is missing.
    pub fn reserve(layout: RamLayout) -> Result<Self, MemoryError> {
        let len_bytes = layout.len_bytes();
        let failed = |source| MemoryError::Reserve { len_bytes, source };
        let len = usize::try_from(len_bytes).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        let pagemap = Pagemap::open().map_err(MemoryError::Pagemap)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(Self {
            discarded: PageBitmap::new(layout.n_pages()),
            mapped: PageBitmap::new(layout.n_pages()),
            layout,
            base,
            len,
            fill: Mutex::new(()),
            pagemap,
        })
    }

    /// Put empty memory under the reservation: zero when touched.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn map(&self) -> Result<(), MemoryError> {
        map_empty(self.base, self.len).map_err(|source| MemoryError::Map {
            len_bytes: self.len as u64,
            source,
        })
    }

    /// Give all memory back, whatever it holds: as after the first [`Self::map`]. For a guest that does not run.
    ///
    /// # Errors
    /// The kernel refused; then there may be memory or not.
    pub fn map_anew(&self) -> Result<(), MemoryError> {
        self.map()?;
        self.discarded.clear();
        self.mapped.clear();
        Ok(())
    }

    /// The memslots, to be registered over the reservation.
    #[must_use]
    pub fn slot_mappings(&self) -> Vec<SlotMapping> {
        let slots = self.layout.slots().iter().zip(0u32..);
        slots
            .map(|(slot, number)| SlotMapping {
                slot: number,
                gpa: slot.gpa,
                hva: self.hva(slot.ram_offset),
                len_bytes: slot.len_bytes,
            })
            .collect()
    }

    /// The same memory for device models and loaders.
    ///
    /// # Errors
    /// A region can't be described.
    pub fn guest_memory(&self) -> Result<GuestMemory, MemoryError> {
        let mut regions = Vec::new();
        for slot in self.layout.slots() {
            let failed = |reason: String| MemoryError::Region {
                gpa: slot.gpa,
                reason,
            };
            let len = usize::try_from(slot.len_bytes).map_err(|e| failed(e.to_string()))?;
            // The builder keeps the pointer and unmaps nothing that it did not map itself.
            let builder = MmapRegionBuilder::<()>::new(len)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
            // SAFETY: the range is part of our reservation, which lives as long as the process in
            // production; tests drop the guest memory before the RAM.
            let builder = unsafe { builder.with_raw_mmap_pointer(self.hva(slot.ram_offset) as *mut u8) };
            let mapping = builder.build().map_err(|e| failed(e.to_string()))?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(slot.gpa));
            regions.push(region.ok_or_else(|| failed("address overflow".to_owned()))?);
        }
        GuestMemory::from_regions(regions).map_err(|e| MemoryError::Region {
            gpa: 0,
            reason: e.to_string(),
        })
    }

    /// Where RAM is.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Host address of a RAM offset.
    #[must_use]
    pub fn hva(&self, ram_offset: u64) -> u64 {
        self.base as u64 + ram_offset
    }

    /// RAM page of a host address.
    #[must_use]
    pub fn page_of(&self, hva: u64) -> Option<u64> {
        let page = hva.checked_sub(self.base as u64)? / PAGE_BYTES;
        (page < self.layout.n_pages()).then_some(page)
    }

    /// Copy whole pages out, beginning with page `first`. Waits for a fill if one is missing.
    ///
    /// # Panics
    /// The range is not RAM: callers count pages of RAM.
    pub fn copy_out(&self, first: u64, buffer: &mut [u8]) {
        let offset = usize::try_from(first)
            .unwrap_or(usize::MAX)
            .saturating_mul(PAGE_SIZE);
        let end = offset.saturating_add(buffer.len());
        assert!(
            end <= self.len,
            "copy of RAM {offset:#x}..{end:#x} is outside of it"
        );
        // SAFETY: `offset` is inside the mapping, as just checked.
        let source = unsafe { self.base.cast::<u8>().add(offset) };
        // SAFETY: source and buffer are valid for the length and can't overlap: one is the mapping, the
        // other a Rust allocation. The guest may write meanwhile; any bytes are valid.
        unsafe { std::ptr::copy_nonoverlapping(source, buffer.as_mut_ptr(), buffer.len()) };
    }

    /// The bytes of whole pages where they are. Waits for a fill if one is missing.
    ///
    /// # Errors
    /// The range is not RAM.
    ///
    /// # Safety
    /// Nobody writes to these pages while the bytes are borrowed, neither a vCPU nor a device nor KVM.
    pub unsafe fn bytes(&self, pages: &Range<u64>) -> io::Result<&[u8]> {
        let (start, len) = self.range(pages)?;
        // SAFETY: the range is inside the mapping, as just checked, and stays as it is, as the caller promises.
        Ok(unsafe { std::slice::from_raw_parts(start.cast(), len) })
    }

    /// Ranges of pages that are present and not those of a mapped image, in order.
    ///
    /// # Errors
    /// The page map can't be read.
    pub fn own_pages(&self) -> io::Result<Vec<Range<u64>>> {
        let present = self.present_pages()?.into_iter();
        Ok(present
            .filter(|found| found.own)
            .map(|found| found.pages)
            .collect())
    }

    /// Ranges of pages that are present, in order: the guest's own, and those of a mapped image that were touched.
    ///
    /// # Errors
    /// The page map can't be read.
    pub fn present_pages(&self) -> io::Result<Vec<Present>> {
        self.pagemap.present(self.base as u64, self.len as u64)
    }

    /// Map pages of a file privately under pages of RAM that nobody has touched or can touch meanwhile.
    ///
    /// # Errors
    /// The kernel refused, or the range is not RAM.
    pub fn map_file(&self, pages: Range<u64>, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        let (start, len) = self.range(&pages)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: the range is inside our own mapping, as just checked, and holds nothing yet.
        let mapped = unsafe { libc::mmap(start, len, protection, flags, file.as_raw_fd(), offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.mapped.set(pages);
        Ok(())
    }

    /// Bring pages of a mapped image into the page table, as copies of their own if they will be written.
    ///
    /// # Errors
    /// Reading the file failed, or there is no memory.
    pub fn populate(&self, pages: Range<u64>, to_write: bool) -> io::Result<()> {
        let (start, len) = self.range(&pages)?;
        let advice = if to_write {
            libc::MADV_POPULATE_WRITE
        } else {
            libc::MADV_POPULATE_READ
        };
        // SAFETY: the range is inside our own mapping, as just checked; this advice changes no contents.
        if unsafe { libc::madvise(start, len, advice) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Whether an image was mapped under this page.
    #[must_use]
    pub fn is_mapped(&self, page: u64) -> bool {
        self.mapped.get(page)
    }

    fn range(&self, pages: &Range<u64>) -> io::Result<(*mut libc::c_void, usize)> {
        if pages.start > pages.end || pages.end > self.layout.n_pages() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = usize::try_from((pages.end - pages.start) * PAGE_BYTES);
        let start = self.hva(pages.start * PAGE_BYTES) as *mut libc::c_void;
        Ok((start, len.map_err(|_| io::ErrorKind::InvalidInput)?))
    }

    /// Whether the guest ever gave this page back.
    #[must_use]
    pub fn is_discarded(&self, page: u64) -> bool {
        self.discarded.get(page)
    }

    /// The guest gave these pages back: free them, and never fill them from an image again. Ranges that are
    /// not whole pages of RAM are cut or ignored: the guest says what it wants.
    pub fn discard(&self, gpa: u64, len_bytes: u64) {
        let Some(aligned) = gpa.checked_next_multiple_of(PAGE_BYTES) else {
            return;
        };
        let len_bytes = len_bytes.saturating_sub(aligned - gpa) / PAGE_BYTES * PAGE_BYTES;
        let Some(offset) = self
            .layout
            .ram_offset(aligned, len_bytes)
            .filter(|_| len_bytes > 0)
        else {
            return;
        };
        let pages = offset / PAGE_BYTES..(offset + len_bytes) / PAGE_BYTES;
        let _no_fill = self.fill.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.discarded.set(pages.clone());
        for (run, is_mapped) in runs_by(pages, |page| self.is_mapped(page)) {
            if let Err(error) = self.free(&run, is_mapped) {
                // Present pages keep counting with their contents, so the image stays right; only memory is lost.
                tracing::warn!(gpa, ?run, %error, "cannot free discarded pages");
            }
        }
    }

    fn free(&self, pages: &Range<u64>, is_mapped: bool) -> io::Result<()> {
        let (start, len) = self.range(pages)?;
        if is_mapped {
            // What the image has must not show through, so there is nothing but empty memory from here on.
            return map_empty(start, len);
        }
        // SAFETY: the range is whole pages of our own private mapping; the guest gave up their contents.
        match unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Replace a part of our own reservation by memory that is zero when touched, and is in no fork and no core dump.
fn map_empty(start: *mut libc::c_void, len: usize) -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: callers name a range of the reservation, so MAP_FIXED replaces nothing else.
    let mapped = unsafe { libc::mmap(start, len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: the range was just mapped; this advice changes no contents.
        if unsafe { libc::madvise(start, len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing uses it any more: KVM VM and guest memory go before it.
        unsafe { libc::munmap(self.base, self.len) };
    }
}

#[cfg(test)]
mod tests;
