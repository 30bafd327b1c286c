//! What an image knows of its pages without looking at them: the checksum of each, and whether it is in this file or in
//! the base under it.
//!
//! Read in blocks as they are needed: a wake touches few, and a machine with much memory has a large table. In memory it
//! is kept in step with the file while a persist writes, so that a later persist, and the pages still to be filled from
//! the file, go on from what the file really holds.

use super::{ImageFile, identity, zero_checksum};
use crate::image::ImageLayout;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

/// Pages of one block: 4 KiB of checksums, 128 bytes of bits.
pub(super) const BLOCK_PAGES: u64 = 1024;
const WORD_PAGES: u64 = 64;

#[derive(Debug)]
pub(super) struct Block {
    pub(super) sums: Vec<AtomicU32>,
    /// One bit per page, set if it is in this file; nothing without a base.
    own: Vec<AtomicU64>,
    changed: AtomicBool,
}

pub(super) fn unread_blocks(layout: ImageLayout) -> Vec<OnceLock<Block>> {
    let n_blocks = layout.n_pages().div_ceil(BLOCK_PAGES);
    (0..n_blocks).map(|_| OnceLock::new()).collect()
}

fn decoded<const N: usize, T>(bytes: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes
        .chunks_exact(N)
        .map(|chunk| decode(chunk.try_into().unwrap_or([0; N])))
        .collect()
}

impl ImageFile {
    pub(super) fn block(&self, page: u64) -> io::Result<(&Block, usize)> {
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
        let first = index * BLOCK_PAGES;
        let n = (self.layout.n_pages() - first).min(BLOCK_PAGES);
        let n_words = self.base.as_ref().map_or(0, |_| n.div_ceil(WORD_PAGES));
        let read = |offset: u64, len_bytes: u64| {
            let mut bytes = vec![0; usize::try_from(len_bytes).unwrap_or(0)];
            self.file.read_exact_at(&mut bytes, offset).map(|()| bytes)
        };
        let (sums, own) = if !self.empty {
            let sums = read(self.layout.checksums_offset() + first * 4, n * 4)?;
            let own = read(own_bits_at(self.layout, index), n_words * 8)?;
            (
                decoded(&sums, |bytes| AtomicU32::new(u32::from_le_bytes(bytes))),
                decoded(&own, |bytes| AtomicU64::new(u64::from_le_bytes(bytes))),
            )
        } else {
            let sum = |page| {
                self.base()
                    .map_or(Ok(zero_checksum()), |base| base.checksum(page))
            };
            let sums = (first..first + n).map(|page| sum(page).map(AtomicU32::new));
            let own = (0..n_words).map(|_| AtomicU64::new(0)).collect();
            (sums.collect::<io::Result<_>>()?, own)
        };
        Ok(Block {
            sums,
            own,
            changed: AtomicBool::new(self.empty),
        })
    }

    /// Checksum of a page as the file, or its base, holds it.
    pub(in crate::image) fn checksum(&self, page: u64) -> io::Result<u32> {
        let (block, within) = self.block(page)?;
        let sum = block.sums.get(within).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(sum.load(Ordering::Acquire))
    }

    /// The file is about to hold a page of this checksum.
    pub(in crate::image) fn set_checksum(&self, page: u64, sum: u32) -> io::Result<()> {
        let (block, within) = self.block(page)?;
        let slot = block.sums.get(within).ok_or(io::ErrorKind::InvalidInput)?;
        if slot.swap(sum, Ordering::AcqRel) != sum {
            block.changed.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Whether a page is in this file and not in its base. Where that can't be read, the checksum can't either, and nobody gets
    /// the page.
    #[must_use]
    pub fn holds(&self, page: u64) -> bool {
        self.base.is_none()
            || self.block(page).map_or(true, |(block, within)| {
                let word = block.own.get(within / 64);
                word.is_none_or(|word| word.load(Ordering::Acquire) >> (within % 64) & 1 == 1)
            })
    }

    /// End of the pages from the first one on that are in the same file as that. By words of bits: a wake asks this of
    /// thousands of pages.
    pub(super) fn layer_end(&self, pages: &Range<u64>) -> u64 {
        if self.base.is_none() {
            return pages.end;
        }
        let held = self.holds(pages.start);
        let mut page = pages.start;
        while page < pages.end {
            // Where the table can't be read, a page is by itself; whoever wants its checksum is told.
            let Ok((block, within)) = self.block(page) else {
                return page.max(pages.start + 1);
            };
            let word = block.own.get(within / 64);
            let word = word.map_or(0, |word| word.load(Ordering::Acquire));
            let others = (if held { !word } else { word }) >> (within % 64);
            let left = WORD_PAGES - page % WORD_PAGES;
            if others != 0 {
                return (page + u64::from(others.trailing_zeros())).min(pages.end);
            }
            page += left;
        }
        pages.end
    }

    /// Whether a page is in that image, be that this one or its base.
    pub(in crate::image) fn takes_from(&self, page: u64, image: &ImageFile) -> bool {
        self.layer(page).identity == image.identity
    }

    /// From here on the pages are in this file, which holds them.
    pub(in crate::image) fn hold(&self, pages: Range<u64>) -> io::Result<()> {
        self.mark(pages, true)
    }

    /// The same for pages that are in the base just as well, until the persist is known to be durable.
    pub(in crate::image) fn hold_for_now(&self, pages: Range<u64>) -> io::Result<()> {
        self.unsettled().push(pages.clone());
        self.mark(pages, true)
    }

    fn mark(&self, pages: Range<u64>, held: bool) -> io::Result<()> {
        if self.base.is_none() {
            return Ok(());
        }
        for page in pages {
            let (block, within) = self.block(page)?;
            let word = block.own.get(within / 64).ok_or(io::ErrorKind::InvalidInput)?;
            let bit = 1 << (within % 64);
            let before = if held {
                word.fetch_or(bit, Ordering::AcqRel)
            } else {
                word.fetch_and(!bit, Ordering::AcqRel)
            };
            if (before & bit != 0) != held {
                block.changed.store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    fn unsettled(&self) -> std::sync::MutexGuard<'_, Vec<Range<u64>>> {
        self.unsettled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A persist failed while it wrote: what reads back from the page cache need not be what the disk holds.
    pub(in crate::image) fn suspect(&self) {
        self.suspect.store(true, Ordering::Release);
        for pages in self.unsettled().drain(..) {
            if let Err(error) = self.mark(pages, false) {
                // It was read before, to be marked: it can't be missing now.
                tracing::error!(%error, "pages of a failed persist are taken to be in the image");
            }
        }
    }

    /// A persist ended well: all that is in memory was written since, and is durable.
    pub(in crate::image) fn trust(&self) {
        self.suspect.store(false, Ordering::Release);
        self.unsettled().clear();
    }

    /// Whether pages that read back well may still be missing on the disk.
    pub(in crate::image) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Acquire)
    }

    /// Write the blocks of the table that changed since they were last written, all loaded ones of a suspect file;
    /// how many bytes.
    ///
    /// A block that can't be written counts as changed still.
    pub(in crate::image) fn write_table(&self, target: &File) -> io::Result<u64> {
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
            let sums: Vec<u8> = sums.flat_map(u32::to_le_bytes).collect();
            let own = block.own.iter().map(|word| word.load(Ordering::Acquire));
            let own: Vec<u8> = own.flat_map(u64::to_le_bytes).collect();
            target.write_all_at(&sums, self.layout.checksums_offset() + index * BLOCK_PAGES * 4)?;
            target.write_all_at(&own, own_bits_at(self.layout, index))?;
            block.changed.store(false, Ordering::Release);
            n_bytes += (sums.len() + own.len()) as u64;
        }
        Ok(n_bytes)
    }

    /// The image that has the pages which are not in this one.
    #[must_use]
    pub fn base(&self) -> Option<&Arc<ImageFile>> {
        self.base.as_ref().map(|base| &base.image)
    }

    /// What this image names it by.
    pub(in crate::image) fn base_name(&self) -> Option<u32> {
        self.base.as_ref().map(|base| base.name)
    }

    /// Whether another descriptor is of the same file.
    ///
    /// # Errors
    /// It can't be examined.
    pub fn is_same_file(&self, other: &File) -> io::Result<bool> {
        Ok(self.identity == identity(other)?)
    }
}

fn own_bits_at(layout: ImageLayout, block: u64) -> u64 {
    layout.own_bits_offset() + block * BLOCK_PAGES / 8
}
