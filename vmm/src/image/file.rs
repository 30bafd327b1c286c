//! Pages of an image and their checksums.
//!
//! The table of checksums is read in blocks as they are needed: a wake touches few, and a machine with much
//! memory has a large table. In memory it is kept in step with the file while a persist writes, so that a later
//! persist, and the pages still to be filled from the file, go on from what the file really holds.

use super::{Extent, ImageLayout};
use crate::layout::{PAGE_BYTES, PAGE_SIZE};
use crate::sys::file_view::FileView;
use crate::sys::page_cache::cached_pages;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use twox_hash::XxHash64;

/// Checksums of one block of the table, 4 KiB of it.
const BLOCK_PAGES: u64 = 1024;

/// Why a page can't be had.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    /// Reading failed.
    #[error("cannot read pages {first}..{end} of the image")]
    Read {
        /// First page.
        first: u64,
        /// End.
        end: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The checksum is wrong.
    #[error("page {page} of the image has checksum {found:#010x}, not {wanted:#010x}")]
    Checksum {
        /// Which page.
        page: u64,
        /// Computed.
        found: u32,
        /// In the table.
        wanted: u32,
    },
}

/// Where missing pages come from.
pub trait PageSource: Send + Sync + std::fmt::Debug {
    /// Read whole pages, each checked.
    ///
    /// # Errors
    /// A page can't be read, or is not what was written.
    fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), PageError>;
    /// Whether a page is zero by its checksum alone: if not, it is not zero.
    ///
    /// # Errors
    /// The checksum can't be read.
    fn may_be_zero(&self, page: u64) -> Result<bool, PageError>;
    /// What [`Self::check`] looks at pages by without copying them, if there is such a thing: for pages that are in memory.
    fn view(&self) -> Option<FileView>;
    /// The bytes of whole pages where the view has them, each checked.
    ///
    /// # Errors
    /// A page is not there, or is not what was written.
    fn check<'a>(&self, pages: Range<u64>, view: &'a FileView) -> Result<&'a [u8], PageError>;
    /// These pages will be read soon.
    fn will_need(&self, pages: Range<u64>);
    /// About how many of these pages would have to come from a disk; none if that can't be known.
    fn n_on_disk(&self, pages: Range<u64>) -> u64;
    /// The file that holds all pages in order, and the offset of page `first`, if they may be mapped from it.
    fn file(&self, first: u64) -> Option<(BorrowedFd<'_>, u64)>;
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    // By memcmp, which ends at the first difference and has vector code whatever we are compiled with.
    bytes
        .chunks(PAGE_SIZE)
        .all(|chunk| *chunk == ZEROS[..chunk.len()])
}

/// Checksum of a page: XXH64 with seed 0, its halves folded. As fast as CRC32C on metal and, being plain
/// arithmetic, ten times as fast where the CRC instruction is emulated.
pub(super) fn page_checksum(page: &[u8]) -> u32 {
    let hash = XxHash64::oneshot(0, page);
    #[expect(clippy::cast_possible_truncation, reason = "the halves were folded")]
    let folded = (hash ^ (hash >> 32)) as u32;
    folded
}

/// Checksum of a page of zeros.
pub(super) fn zero_checksum() -> u32 {
    static SUM: OnceLock<u32> = OnceLock::new();
    *SUM.get_or_init(|| page_checksum(&[0; PAGE_SIZE]))
}

#[derive(Debug)]
struct Block {
    sums: Vec<AtomicU32>,
    changed: AtomicBool,
}

/// An image file and the checksums of its pages.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    layout: ImageLayout,
    identity: (u64, u64),
    blocks: Vec<OnceLock<Block>>,
    empty: bool,
    suspect: AtomicBool,
}

impl ImageFile {
    /// A file that holds an image.
    ///
    /// # Errors
    /// It can't be examined.
    pub fn open(file: File, layout: ImageLayout) -> io::Result<Self> {
        Self::new(file, layout, false)
    }

    /// A file that holds no page yet: all are zero.
    ///
    /// # Errors
    /// It can't be examined.
    pub fn empty(file: File, layout: ImageLayout) -> io::Result<Self> {
        Self::new(file, layout, true)
    }

    fn new(file: File, layout: ImageLayout, empty: bool) -> io::Result<Self> {
        let n_blocks = usize::try_from(layout.n_pages().div_ceil(BLOCK_PAGES)).unwrap_or(0);
        Ok(Self {
            identity: identity(&file)?,
            file,
            layout,
            blocks: (0..n_blocks).map(|_| OnceLock::new()).collect(),
            empty,
            suspect: AtomicBool::new(false),
        })
    }

    /// Where the parts are.
    #[must_use]
    pub fn layout(&self) -> ImageLayout {
        self.layout
    }

    /// Whether another descriptor is of the same file.
    ///
    /// # Errors
    /// It can't be examined.
    pub fn is_same_file(&self, other: &File) -> io::Result<bool> {
        Ok(self.identity == identity(other)?)
    }

    fn block(&self, page: u64) -> io::Result<(&Block, usize)> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let index = page / BLOCK_PAGES;
        let slot = usize::try_from(index)
            .ok()
            .and_then(|i| self.blocks.get(i))
            .ok_or_else(outside)?;
        let within = usize::try_from(page % BLOCK_PAGES).map_err(|_| outside())?;
        if let Some(block) = slot.get() {
            return Ok((block, within));
        }
        let block = self.load(index)?;
        Ok((slot.get_or_init(|| block), within))
    }

    fn load(&self, index: u64) -> io::Result<Block> {
        let n = (self.layout.n_pages() - index * BLOCK_PAGES).min(BLOCK_PAGES);
        let mut bytes = vec![0; usize::try_from(n * 4).unwrap_or(0)];
        let sums = if self.empty {
            (0..n).map(|_| AtomicU32::new(zero_checksum())).collect()
        } else {
            let offset = self.layout.checksums_offset() + index * BLOCK_PAGES * 4;
            self.file.read_exact_at(&mut bytes, offset)?;
            let sum = |chunk: &[u8]| u32::from_le_bytes(chunk.try_into().unwrap_or_default());
            bytes
                .chunks_exact(4)
                .map(|chunk| AtomicU32::new(sum(chunk)))
                .collect()
        };
        Ok(Block {
            sums,
            changed: AtomicBool::new(self.empty),
        })
    }

    /// Checksum of a page as the file holds it.
    pub(super) fn checksum(&self, page: u64) -> io::Result<u32> {
        let (block, within) = self.block(page)?;
        let sum = block.sums.get(within).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(sum.load(Ordering::Acquire))
    }

    /// Extents of all pages that are not zero, if they are no more than `limit`. By the table alone, which may take a
    /// page for zero that is not: for whoever only wants to be early with most of them.
    ///
    /// # Errors
    /// The table can't be read.
    pub fn data_extents(&self, limit: u64) -> io::Result<Option<Vec<Extent>>> {
        let zero = zero_checksum();
        let (mut extents, mut n_found, mut page) = (Vec::new(), 0, 0);
        let mut first = 0;
        while page < self.layout.n_pages() {
            // By blocks: a look-up for each page would cost more than what it saves.
            let (block, _) = self.block(page)?;
            for sum in &block.sums {
                if sum.load(Ordering::Relaxed) == zero {
                    extents.extend(Extent::new(first..page));
                    first = page + 1;
                } else {
                    n_found += 1;
                }
                page += 1;
            }
            if n_found > limit {
                return Ok(None);
            }
        }
        extents.extend(Extent::new(first..page));
        Ok(Some(extents))
    }

    /// The file is about to hold a page of this checksum.
    pub(super) fn set_checksum(&self, page: u64, sum: u32) -> io::Result<()> {
        let (block, within) = self.block(page)?;
        let slot = block.sums.get(within).ok_or(io::ErrorKind::InvalidInput)?;
        if slot.swap(sum, Ordering::AcqRel) != sum {
            block.changed.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// A persist failed while it wrote: what reads back from the page cache need not be what the disk holds.
    pub(super) fn suspect(&self) {
        self.suspect.store(true, Ordering::Release);
    }

    /// A persist ended well: all that is in memory was written since, and is durable.
    pub(super) fn trust(&self) {
        self.suspect.store(false, Ordering::Release);
    }

    /// Whether pages that read back well may still be missing on the disk.
    pub(super) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Acquire)
    }

    /// Write the blocks of the table that changed since they were last written, all loaded ones of a suspect file;
    /// how many bytes.
    ///
    /// A block that can't be written counts as changed still.
    pub(super) fn write_checksums(&self, target: &File) -> io::Result<u64> {
        let mut n_bytes = 0;
        for index in 0..self.blocks.len() as u64 {
            if self.empty {
                self.block(index * BLOCK_PAGES)?;
            }
            let slot = usize::try_from(index).ok().and_then(|i| self.blocks.get(i));
            let Some(block) = slot.and_then(OnceLock::get) else {
                continue;
            };
            if !block.changed.load(Ordering::Acquire) && !self.is_suspect() {
                continue;
            }
            let sums = block.sums.iter().map(|sum| sum.load(Ordering::Acquire));
            let bytes: Vec<u8> = sums.flat_map(u32::to_le_bytes).collect();
            target.write_all_at(&bytes, self.layout.checksums_offset() + index * BLOCK_PAGES * 4)?;
            block.changed.store(false, Ordering::Release);
            n_bytes += bytes.len() as u64;
        }
        Ok(n_bytes)
    }

    fn verify(&self, first: u64, content: &[u8]) -> Result<(), PageError> {
        let end = first + (content.len() / PAGE_SIZE) as u64;
        for (content, page) in content.chunks_exact(PAGE_SIZE).zip(first..) {
            let wanted = self.checksum(page);
            let wanted = wanted.map_err(|source| PageError::Read { first, end, source })?;
            let found = page_checksum(content);
            if found != wanted {
                return Err(PageError::Checksum { page, found, wanted });
            }
        }
        Ok(())
    }

    /// Read pages as they are, unchecked.
    pub(super) fn read_raw(&self, first: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, self.layout.page_offset(first))
    }
}

impl PageSource for ImageFile {
    fn read(&self, first: u64, buffer: &mut [u8]) -> Result<(), PageError> {
        let end = first + (buffer.len() / PAGE_SIZE) as u64;
        let failed = |source| PageError::Read { first, end, source };
        self.read_raw(first, buffer).map_err(failed)?;
        self.verify(first, buffer)
    }

    fn may_be_zero(&self, page: u64) -> Result<bool, PageError> {
        let sum = self.checksum(page);
        let sum = sum.map_err(|source| PageError::Read {
            first: page,
            end: page + 1,
            source,
        })?;
        Ok(sum == zero_checksum())
    }

    fn view(&self) -> Option<FileView> {
        let len_bytes = self.layout.n_pages() * PAGE_BYTES;
        FileView::new(self.file.as_fd(), self.layout.data_offset(), len_bytes).ok()
    }

    fn check<'a>(&self, pages: Range<u64>, view: &'a FileView) -> Result<&'a [u8], PageError> {
        let bytes = view.bytes(pages.start * PAGE_BYTES..pages.end * PAGE_BYTES);
        let bytes = bytes.ok_or_else(|| PageError::Read {
            first: pages.start,
            end: pages.end,
            source: io::ErrorKind::UnexpectedEof.into(),
        })?;
        self.verify(pages.start, bytes)?;
        Ok(bytes)
    }

    fn will_need(&self, pages: Range<u64>) {
        let offset = i64::try_from(self.layout.page_offset(pages.start));
        let len = i64::try_from((pages.end - pages.start) * PAGE_BYTES);
        if let (Ok(offset), Ok(len)) = (offset, len) {
            let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_WILLNEED;
            // A hint: without it the reads are only slower.
            let _ = nix::fcntl::posix_fadvise(&self.file, offset, len, advice);
        }
    }

    fn n_on_disk(&self, pages: Range<u64>) -> u64 {
        let bytes = self.layout.page_offset(pages.start)..self.layout.page_offset(pages.end);
        let n_pages = pages.end - pages.start;
        match cached_pages(self.file.as_fd(), bytes) {
            Ok(n_cached) if n_cached < n_pages => {
                // Zero pages are holes, which no disk has.
                let zero = zero_checksum();
                let is_data = |page: &u64| self.checksum(*page).is_ok_and(|sum| sum != zero);
                (pages.filter(is_data).count() as u64).saturating_sub(n_cached)
            }
            Ok(_) | Err(_) => 0,
        }
    }

    fn file(&self, first: u64) -> Option<(BorrowedFd<'_>, u64)> {
        Some((self.file.as_fd(), self.layout.page_offset(first)))
    }
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}
