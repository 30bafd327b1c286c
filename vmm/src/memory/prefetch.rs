//! The working set, put in place before the vCPUs run.
//!
//! Two ways, for the same pages and with the same checks. *Copied*: read, checked, copied in by userfaultfd; the
//! memory is this process's alone. *Mapped*: read, checked, and then the image's own pages in the page cache are
//! mapped privately: nothing is copied, clones of one image share them, and they cost no memory of this process
//! until they are written. Runs of zero pages are zero pages either way.
//!
//! Only for a guest that does not run yet: replacing a mapping under a running vCPU would race with its faults, and a
//! guest that runs could give pages back meanwhile. Two threads share the work.
//! A page that is mapped was checked when it was read into the page cache; an image in use is written by nobody but
//! the persist of its own machine, which leaves pages alone that the guest did not write.

use super::lazy::{FillError, Kind, LazyMemory, Shared, runs};
use crate::image::Extent;
use crate::layout::PAGE_SIZE;
use crate::pages::{bridged, pieces, runs_by, union};
use std::ops::Range;

/// Pages read and checked at once.
const BATCH_PAGES: u64 = 64;
/// Pages between two parts of the working set that are mapped with them: they cost less than another mapping.
const GAP_PAGES: u64 = 8;
/// A run of zero pages shorter than this between others is mapped with them: every run costs a mapping.
const SHORT_ZERO_RUN_PAGES: u64 = 8;
/// Most separate mappings of one working set; the kernel's limit for a process is 65,530 by default.
const MAX_MAPPINGS: usize = 8192;

/// How pages get from the image into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// As copies.
    Copied,
    /// As private mappings of the image.
    #[default]
    Mapped,
}

impl LazyMemory {
    /// Put pages in place ahead of their first touch; how many there were.
    ///
    /// # Errors
    /// A page can't be read or is wrong.
    pub fn prefetch(&self, extents: &[Extent], placement: Placement) -> Result<u64, FillError> {
        let shared = &self.shared;
        let n_pages = shared.ram.layout().n_pages();
        let wanted = extents.iter().map(|extent| extent.pages(n_pages)).collect();
        let ranges = match placement {
            Placement::Copied => union(wanted),
            Placement::Mapped => bridged(wanted, GAP_PAGES),
        };
        for range in &ranges {
            shared.source.will_need(range.clone());
        }
        let filled = std::thread::scope(|scope| {
            let (first, second) = halves(&ranges);
            let helper = scope.spawn(|| shared.prefetch(second, placement));
            let filled = shared.prefetch(first, placement)?;
            match helper.join() {
                Ok(others) => Ok(filled + others?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        if placement == Placement::Mapped {
            let written = extents.iter().filter(|extent| extent.is_written());
            shared.populate(union(written.map(|extent| extent.pages(n_pages)).collect()), true);
        }
        filled
    }

    /// Bring the mapped pages of the extents into this process's page table, for a KVM that can't do so itself.
    pub fn populate(&self, extents: &[Extent]) {
        let n_pages = self.shared.ram.layout().n_pages();
        let pages = extents.iter().map(|extent| extent.pages(n_pages));
        self.shared.populate(union(pages.collect()), false);
    }
}

impl Shared {
    fn prefetch(&self, ranges: &[Range<u64>], placement: Placement) -> Result<u64, FillError> {
        let mut buffer = vec![0; PAGE_SIZE * usize::try_from(BATCH_PAGES).unwrap_or(1)];
        let mut mapper = Mapper::new(self);
        let mut n_filled = 0;
        for pages in ranges
            .iter()
            .cloned()
            .flat_map(|range| pieces(range, BATCH_PAGES))
        {
            let may_map = placement == Placement::Mapped && mapper.n_mappings < MAX_MAPPINGS / 2;
            n_filled += if may_map && self.source.file(pages.start).is_some() {
                mapper.place(pages, &mut buffer)?
            } else {
                self.fill(pages, &mut buffer)?
            };
        }
        mapper.flush()?;
        Ok(n_filled)
    }

    /// Best effort: a page that can't be brought now is brought, or refused, when it is touched.
    fn populate(&self, ranges: Vec<Range<u64>>, to_write: bool) {
        for pages in ranges {
            let mapped = runs_by(pages, |page| self.ram.is_mapped(page)).filter(|(_, is_mapped)| *is_mapped);
            for (run, _) in mapped {
                if let Err(error) = self.ram.populate(run.clone(), to_write) {
                    tracing::debug!(?run, %error, "mapped pages not populated");
                }
            }
        }
    }
}

/// Joins neighbours, so that a run of pages is one mapping.
struct Mapper<'s> {
    shared: &'s Shared,
    run: Range<u64>,
    n_mappings: usize,
}

impl<'s> Mapper<'s> {
    fn new(shared: &'s Shared) -> Self {
        Self {
            shared,
            run: 0..0,
            n_mappings: 0,
        }
    }

    /// Check the pages of a batch and map what is not zero; how many pages.
    fn place(&mut self, pages: Range<u64>, buffer: &mut [u8]) -> Result<u64, FillError> {
        let shared = self.shared;
        let mut n_filled = 0;
        let runs = runs_by(pages, |page| shared.kind(page));
        for (run, _) in runs.filter(|(_, kind)| *kind == Kind::InImage) {
            n_filled += run.end - run.start;
            self.place_missing(run, buffer)?;
        }
        Ok(n_filled)
    }

    fn place_missing(&mut self, pages: Range<u64>, buffer: &mut [u8]) -> Result<(), FillError> {
        let len = PAGE_SIZE * usize::try_from(pages.end - pages.start).unwrap_or(0);
        let buffer = &mut buffer[..len];
        let failed = |source| FillError::Source {
            first: pages.start,
            end: pages.end,
            source,
        };
        self.shared.source.read(pages.start, buffer).map_err(failed)?;
        let mut first = pages.start;
        for run in runs(buffer) {
            let end = first + (run.bytes.len() / PAGE_SIZE) as u64;
            if run.zero && end - first >= SHORT_ZERO_RUN_PAGES {
                self.shared.place_zeros(first..end)?;
            } else {
                self.add(first..end)?;
            }
            first = end;
        }
        self.shared.count_pages(pages.end - pages.start);
        self.shared.filled.set(pages);
        Ok(())
    }

    fn add(&mut self, pages: Range<u64>) -> Result<(), FillError> {
        if self.run.end == pages.start && !self.run.is_empty() {
            self.run.end = pages.end;
            return Ok(());
        }
        self.flush()?;
        self.run = pages;
        Ok(())
    }

    /// Make the mapping of the run that is complete.
    fn flush(&mut self) -> Result<(), FillError> {
        let pages = std::mem::take(&mut self.run);
        if pages.is_empty() {
            return Ok(());
        }
        let failed = |source| FillError::Place {
            first: pages.start,
            end: pages.end,
            source,
        };
        let unmappable = || failed(std::io::ErrorKind::Unsupported.into());
        let (file, offset) = self.shared.source.file(pages.start).ok_or_else(unmappable)?;
        self.n_mappings += 1;
        self.shared
            .ram
            .map_file(pages.clone(), file, offset)
            .map_err(failed)
    }
}

/// The same ranges in two parts of about as many pages, for two threads.
fn halves(ranges: &[Range<u64>]) -> (&[Range<u64>], &[Range<u64>]) {
    let n_pages: u64 = ranges.iter().map(|range| range.end - range.start).sum();
    let mut before = 0;
    let middle = ranges.iter().position(|range| {
        before += range.end - range.start;
        before * 2 >= n_pages
    });
    ranges.split_at(middle.map_or(0, |at| at + 1))
}
