//! Which pages a persist writes, which it makes holes, and which it takes over from the base under the image.
//!
//! A page that is present, and not that of a mapped image, is compared with what the image holds. Any other was not
//! written since the restore, and keeps what the image has, unless the guest gave it back, which makes it zero;
//! no persist that failed has written it. So no log of writes is needed, and what devices wrote is seen like what
//! the guest wrote.

use super::{CHUNK_PAGES, PersistError, check_cancel, failed};
use crate::image::file::page_checksum;
use crate::image::{ImageFile, PageSource, is_zero};
use crate::layout::PAGE_SIZE;
use crate::memory::Ram;
use crate::pages::{contains, pieces, push, union};
use std::ops::Range;
use std::sync::atomic::AtomicBool;

/// Pages of the base between two that the image has itself that are put into it, too: a wake maps every run of pages from one file by
/// itself, and bridges as many pages between those that it needs. The http guest's image has 8,000 pages of its own in 280 runs;
/// 32 bring that to 32 runs with 1,850 pages more, and a wake to 102 mappings instead of 489.
const TAKE_OVER_GAP_PAGES: u64 = 32;

/// What to write.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Pages to be written, in order.
    pub write: Vec<Range<u64>>,
    /// Pages to be made holes, in order.
    pub punch: Vec<Range<u64>>,
    /// Pages of the base to be put into the image unchanged, in order.
    pub take_over: Vec<Range<u64>>,
    /// Pages present in memory.
    pub present_pages: u64,
    /// Pages of those that are all zero.
    pub zero_pages: u64,
    present: Vec<Range<u64>>,
    blank: bool,
}

impl Plan {
    /// Compare memory with the image, which is all zeros if it is `blank`.
    ///
    /// # Errors
    /// Cancelled, or the image can't be read.
    pub fn make(
        ram: &Ram,
        baseline: &ImageFile,
        source: Option<&ImageFile>,
        blank: bool,
        cancel: &AtomicBool,
    ) -> Result<Self, PersistError> {
        let mut plan = Self {
            present: ram.own_pages().map_err(failed("find present pages"))?,
            blank,
            ..Self::default()
        };
        let mut buffers = Buffers::new();
        let mut from = 0;
        for pages in plan.present.clone() {
            plan.absent(ram, baseline, source, from..pages.start, &mut buffers, cancel)?;
            for chunk in pieces(pages.clone(), CHUNK_PAGES) {
                check_cancel(cancel)?;
                plan.present_chunk(ram, baseline, chunk, &mut buffers)?;
            }
            plan.present_pages += pages.end - pages.start;
            from = pages.end;
        }
        let rest = from..ram.layout().n_pages();
        plan.absent(ram, baseline, source, rest, &mut buffers, cancel)?;
        if baseline.base().is_some() {
            plan.close_gaps(baseline, &mut buffers)?;
        }
        Ok(plan)
    }

    /// Pages to be written.
    #[must_use]
    pub fn written_pages(&self) -> u64 {
        self.write.iter().map(|pages| pages.end - pages.start).sum()
    }

    /// Whether a page was present when the plan was made.
    #[must_use]
    pub fn is_present(&self, page: u64) -> bool {
        contains(&self.present, page)
    }

    fn present_chunk(
        &mut self,
        ram: &Ram,
        baseline: &ImageFile,
        pages: Range<u64>,
        buffers: &mut Buffers,
    ) -> Result<(), PersistError> {
        let len = PAGE_SIZE * usize::try_from(pages.end - pages.start).unwrap_or(0);
        ram.copy_out(pages.start, &mut buffers.new[..len]);
        let mut old_is_read = None;
        for (page, at) in pages.clone().zip((0..len).step_by(PAGE_SIZE)) {
            let bytes = &buffers.new[at..at + PAGE_SIZE];
            let zero = is_zero(bytes);
            self.zero_pages += u64::from(zero);
            // A blank file is all zeros; otherwise equal checksums do not make equal pages. What a failed persist
            // left in the page cache looks written and may not be, so there no page counts as equal.
            let same = if self.blank {
                zero
            } else if baseline.is_suspect() {
                false
            } else if baseline
                .checksum(page)
                .map_err(failed("read checksums of the image"))?
                == page_checksum(bytes)
            {
                // Where the old page can't be read, the new one is written.
                let read = || baseline.read_raw(pages.start, &mut buffers.old[..len]).is_ok();
                *old_is_read.get_or_insert_with(read) && buffers.old[at..at + PAGE_SIZE] == *bytes
            } else {
                false
            };
            match (same, zero) {
                (true, _) => {}
                (false, true) => push(&mut self.punch, page..page + 1),
                (false, false) => push(&mut self.write, page..page + 1),
            }
        }
        Ok(())
    }

    fn absent(
        &mut self,
        ram: &Ram,
        baseline: &ImageFile,
        source: Option<&ImageFile>,
        pages: Range<u64>,
        buffers: &mut Buffers,
        cancel: &AtomicBool,
    ) -> Result<(), PersistError> {
        for chunk in pieces(pages, CHUNK_PAGES) {
            check_cancel(cancel)?;
            for page in chunk.clone() {
                if ram.is_discarded(page) {
                    push(&mut self.punch, page..page + 1);
                }
            }
            let Some(source) = source else { continue };
            let is_there = |page| baseline.base().is_some_and(|base| source.takes_from(page, base));
            for page in chunk.filter(|page| !ram.is_discarded(*page) && !is_there(*page)) {
                let content = &mut buffers.old[..PAGE_SIZE];
                source.read(page, content)?;
                if !is_zero(content) {
                    push(&mut self.write, page..page + 1);
                } else if !self.blank {
                    // What the base has instead need not be zero.
                    push(&mut self.punch, page..page + 1);
                }
            }
        }
        Ok(())
    }

    /// Take over what of the base lies between pages that the image gets now and others that it has or gets.
    fn close_gaps(&mut self, baseline: &ImageFile, buffers: &mut Buffers) -> Result<(), PersistError> {
        let written = union([self.write.as_slice(), &self.punch].concat());
        let is_own = |page: u64| baseline.holds(page) || contains(&written, page);
        let n_pages = baseline.layout().n_pages();
        let mut gaps = Vec::new();
        for run in &written {
            let before = run.start.saturating_sub(TAKE_OVER_GAP_PAGES + 1)..run.start;
            let after = run.end..(run.end + TAKE_OVER_GAP_PAGES + 1).min(n_pages);
            gaps.extend(
                before
                    .rev()
                    .find(|page| is_own(*page))
                    .map(|page| page + 1..run.start),
            );
            gaps.extend(
                after
                    .into_iter()
                    .find(|page| is_own(*page))
                    .map(|page| run.end..page),
            );
        }
        for gap in union(gaps) {
            for page in gap.filter(|page| !is_own(*page)) {
                let content = &mut buffers.old[..PAGE_SIZE];
                // Zeros are holes, in this image as in the base.
                let zero = baseline.may_be_zero(page)? && {
                    baseline.read(page, content)?;
                    is_zero(content)
                };
                push(
                    if zero {
                        &mut self.punch
                    } else {
                        &mut self.take_over
                    },
                    page..page + 1,
                );
            }
        }
        self.punch = union(std::mem::take(&mut self.punch));
        Ok(())
    }
}

struct Buffers {
    new: Vec<u8>,
    old: Vec<u8>,
}

impl Buffers {
    fn new() -> Self {
        let len = PAGE_SIZE * usize::try_from(CHUNK_PAGES).unwrap_or(1);
        Self {
            new: vec![0; len],
            old: vec![0; len],
        }
    }
}
