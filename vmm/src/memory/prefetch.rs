//! The working set, put in place before the vCPUs run.
//!
//! Three ways, for the same pages and with the same checks. *Copied*: checked, copied in by userfaultfd; the
//! memory is this process's alone. *Mapped*: checked, and then the image's own pages in the page cache are
//! mapped privately: nothing is copied, clones of one image share them, and they cost no memory of this process
//! until they are written. *Unwatched* ([`super::unwatched`]): mapped, and then checked where they are. Runs of zero pages are zero
//! pages in any case.
//! Pages that the page cache holds are checked where they are, others are read.
//!
//! Only for a guest that does not run yet: replacing a mapping under a running vCPU would race with its faults, and a
//! guest that runs could give pages back meanwhile. Its vCPUs have their state by then, since KVM writes to memory when they take
//! it. Two threads share the work.
//! A page that is mapped was checked when it was read into the page cache; an image in use is written by nobody but
//! the persist of its own machine, which leaves pages alone that the guest did not write.

use super::lazy::{FillError, Kind, LazyMemory, Run, Shared, runs};
use crate::image::{Extent, ImageView, in_one_file};
use crate::layout::{PAGE_BYTES, PAGE_SIZE};
use crate::pages::{bridged, contains, pieces, runs_by, union};
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// Pages read and checked at once.
pub(super) const BATCH_PAGES: u64 = 64;
/// Pages between two parts of the working set that are checked and mapped with them. Another mapping costs as much as
/// checking about 16 pages, in the virtual host and on metal; the rest is for what the guest touches after its first
/// answer, which it finds mapped: with 12, a wake was no faster, and a fifth more pages had to be copied until the next pause.
const GAP_PAGES: u64 = 32;
/// The same for an image that has to come from the disk: reading a page costs far more than a mapping then.
const COLD_GAP_PAGES: u64 = 4;
/// An image counts as one that has to come from the disk if one page in so many is not in the page cache.
const COLD_FROM_ONE_IN: u64 = 8;
/// A run of zero pages shorter than this between others is mapped with them: every run costs a mapping, and every page a
/// place in the page table.
pub(super) const LONG_ZERO_RUN_PAGES: u64 = 32;
/// Most separate mappings of one working set; the kernel's limit for a process is 65,530 by default.
pub(super) const MAX_MAPPINGS: usize = 8192;

/// How pages get from the image into guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// As copies.
    Copied,
    /// As private mappings of the image, so that the page table tells which of them the guest touches.
    Mapped,
    /// As private mappings of the image, without that: half the page faults. As mapped if the image has to come from a disk.
    Unwatched,
}

/// What was put in place, and when each step was done.
#[derive(Debug, Clone, Copy)]
pub struct Prefetched {
    /// Pages.
    pub n_pages: u64,
    /// All were read and checked, or copied. Unwatched, that comes last.
    pub checked: Instant,
    /// All that are to be mapped were mapped.
    pub mapped: Instant,
    /// All that are known to be needed are in the page table.
    pub populated: Instant,
}

impl LazyMemory {
    /// Put pages in place ahead of their first touch. Whether mapped pages that are only read are brought into the page
    /// table is up to the caller: `KVM_PRE_FAULT_MEMORY` does that, too, and needs no call more for it.
    ///
    /// # Errors
    /// A page can't be read or is wrong.
    pub fn prefetch(
        &self,
        extents: &[Extent],
        placement: Placement,
        populates_read: bool,
    ) -> Result<Prefetched, FillError> {
        let shared = &self.shared;
        let limit = shared.ram.layout().n_pages();
        let wanted: Vec<_> = extents.iter().map(|extent| extent.pages(limit)).collect();
        let with_gaps = |gap| match placement {
            Placement::Copied => union(wanted.clone()),
            Placement::Mapped | Placement::Unwatched => bridged(wanted.clone(), gap),
        };
        let mut ranges = with_gaps(GAP_PAGES);
        let is_in_memory = !shared.is_on_disk(&ranges);
        if !is_in_memory {
            ranges = with_gaps(COLD_GAP_PAGES);
            for range in &ranges {
                shared.source.will_need(range.clone());
            }
        }
        if is_in_memory && placement == Placement::Unwatched {
            return self.lay_out_unwatched(extents, ranges);
        }
        let view = shared.keep_view(is_in_memory);
        let pieces = ranges.into_iter().flat_map(|range| pieces(range, BATCH_PAGES));
        let batches: Vec<_> = pieces.collect();
        let (mut n_pages, mut to_map) = (0, Vec::new());
        for fetched in in_two(&batches, |batches| {
            shared.fetch(batches, placement, view.as_deref())
        }) {
            let fetched = fetched?;
            n_pages += fetched.n_pages;
            for pages in fetched.to_map {
                shared.push_mapping(&mut to_map, pages);
            }
        }
        let checked = Instant::now();
        // Set once, like the next: memory is put in place ahead once.
        let to_map = shared.mapped.get_or_init(|| to_map);
        // By one thread: mappings exclude each other and all page faults of the process.
        for pages in to_map {
            shared.map(pages)?;
            shared.watch(pages);
        }
        let mapped = Instant::now();
        let ahead = shared
            .ahead
            .get_or_init(|| union(of_extents(extents, limit, |extent| !extent.is_tentative())));
        let written = union(of_extents(extents, limit, Extent::is_written));
        in_two(ahead, |ranges| shared.populate(ranges, &written, populates_read));
        Ok(Prefetched {
            n_pages,
            checked,
            mapped,
            populated: Instant::now(),
        })
    }

    /// Whether the page cache still has all pages that were mapped, as far as it tells.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        let mapped = self.shared.mapped.get().into_iter().flatten();
        let mut n_on_disk = mapped.map(|pages| self.shared.source.n_on_disk(pages.clone()));
        n_on_disk.all(|n| n == 0)
    }

    /// Take the view down by which the pages were checked: before its time, for a guest that does not run soon.
    pub fn close_view(&self) {
        self.shared.view().take();
    }

    /// Pages of the working set that the guest is known to need, in order.
    #[must_use]
    pub fn ahead(&self) -> &[Range<u64>] {
        self.shared.ahead.get().map_or(&[], Vec::as_slice)
    }
}

/// Pages of those extents of which something is true.
pub(super) fn of_extents(
    extents: &[Extent],
    limit: u64,
    is_wanted: impl Fn(&Extent) -> bool,
) -> Vec<Range<u64>> {
    let wanted = extents.iter().filter(|extent| is_wanted(extent));
    wanted.map(|extent| extent.pages(limit)).collect()
}

/// What one thread read and checked.
#[derive(Default)]
pub(super) struct Fetched {
    n_pages: u64,
    /// Pages that are to be mapped, in order, those of a range from one file.
    pub(super) to_map: Vec<Range<u64>>,
}

impl Shared {
    /// Whether more than next to nothing of the ranges has to come from a disk.
    fn is_on_disk(&self, ranges: &[Range<u64>]) -> bool {
        let n_missing: u64 = ranges
            .iter()
            .map(|range| self.source.n_on_disk(range.clone()))
            .sum();
        let n_pages: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        n_missing * COLD_FROM_ONE_IN > n_pages
    }

    /// A view of an image that is in memory, kept for a while.
    fn keep_view(&self, is_in_memory: bool) -> Option<Arc<ImageView>> {
        let view = Arc::new(self.source.view().filter(|_| is_in_memory)?);
        *self.view() = Some(Arc::clone(&view));
        Some(view)
    }

    pub(super) fn fetch(
        &self,
        batches: &[Range<u64>],
        placement: Placement,
        view: Option<&ImageView>,
    ) -> Result<Fetched, FillError> {
        let (mut buffer, mut fetched) = (Vec::new(), Fetched::default());
        for pages in batches {
            let may_map = placement != Placement::Copied
                && fetched.to_map.len() < MAX_MAPPINGS / 2
                && self.source.file(pages.start).is_some();
            let runs = in_one_file(&*self.source, pages.clone())
                .flat_map(|part| runs_by(part, |page| self.kind(page)));
            for (run, _) in runs.filter(|(_, kind)| *kind == Kind::InImage) {
                let content = self.checked(&run, view, &mut buffer)?;
                fetched.n_pages += run.end - run.start;
                self.place_or_map(run, content, may_map.then_some(&mut fetched.to_map))?;
            }
        }
        Ok(fetched)
    }

    /// The content of missing pages, checked.
    fn checked<'a>(
        &self,
        pages: &Range<u64>,
        view: Option<&'a ImageView>,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], FillError> {
        let failed = FillError::source(pages);
        self.count_pages(pages.end - pages.start);
        if let Some(view) = view {
            return self.source.check(pages.clone(), view).map_err(failed);
        }
        let len = PAGE_SIZE * usize::try_from(pages.end - pages.start).unwrap_or(0);
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        self.source
            .read(pages.start, &mut buffer[..len])
            .map_err(failed)?;
        Ok(&buffer[..len])
    }

    /// Long runs of zeros are put in place at once, other pages too if they are not to be mapped.
    fn place_or_map(
        &self,
        pages: Range<u64>,
        content: &[u8],
        mut to_map: Option<&mut Vec<Range<u64>>>,
    ) -> Result<(), FillError> {
        let shortest = if to_map.is_some() { LONG_ZERO_RUN_PAGES } else { 1 };
        let mut put = |pages: Range<u64>, run: &Run<'_>| match &mut to_map {
            Some(to_map) if !run.zero || pages.end - pages.start < LONG_ZERO_RUN_PAGES => {
                self.push_mapping(to_map, pages);
                Ok(())
            }
            _ => {
                self.place(pages.clone(), (!run.zero).then_some(run.bytes))?;
                self.filled.set(pages);
                Ok(())
            }
        };
        // Looking for zeros in what has none would cost as much as checking it.
        if !self.may_have_zeros(&pages, shortest)? {
            let all = Run {
                bytes: content,
                zero: false,
            };
            return put(pages, &all);
        }
        let mut first = pages.start;
        for run in runs(content) {
            let end = first + (run.bytes.len() / PAGE_SIZE) as u64;
            put(first..end, &run)?;
            first = end;
        }
        Ok(())
    }

    /// Add pages of one file behind all others.
    pub(super) fn push_mapping(&self, to_map: &mut Vec<Range<u64>>, pages: Range<u64>) {
        match to_map.last_mut() {
            Some(last)
                if last.end == pages.start
                    && self.source.same_file_end(&(last.end - 1..pages.end)) == pages.end =>
            {
                last.end = pages.end;
            }
            _ => to_map.push(pages),
        }
    }

    /// Whether a run of so many of these pages may be zero.
    pub(super) fn may_have_zeros(&self, pages: &Range<u64>, shortest: u64) -> Result<bool, FillError> {
        let mut n_zero = 0;
        for page in pages.clone() {
            let zero = self.source.may_be_zero(page).map_err(FillError::source(pages))?;
            n_zero = if zero { n_zero + 1 } else { 0 };
            if n_zero >= shortest {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn map(&self, pages: &Range<u64>) -> Result<(), FillError> {
        let failed = FillError::place(pages);
        let unmappable = || failed(std::io::ErrorKind::Unsupported.into());
        let (file, offset) = self.source.file(pages.start).ok_or_else(unmappable)?;
        self.ram.map_file(pages.clone(), file, offset).map_err(failed)?;
        self.filled.set(pages.clone());
        Ok(())
    }

    /// Have the page table tell which of these mapped pages are touched, and not their neighbours as well.
    fn watch(&self, pages: &Range<u64>) {
        let len_bytes = (pages.end - pages.start) * PAGE_BYTES;
        let start = self.ram.hva(pages.start * PAGE_BYTES);
        if let Err(error) = self.uffd.map_single_pages(start, len_bytes) {
            tracing::debug!(?pages, %error, "working set will be recorded with neighbours of touched pages");
        }
    }

    /// Bring pages of the mapped image into the page table, so that KVM and the guest find them there; those that
    /// will be written, as copies.
    ///
    /// Best effort: a page that can't be brought now is brought, or refused, when it is touched.
    pub(super) fn populate(&self, ranges: &[Range<u64>], written: &[Range<u64>], populates_read: bool) {
        for pages in ranges {
            let runs = runs_by(pages.clone(), |page| {
                (self.ram.is_mapped(page), contains(written, page))
            });
            let wanted = |is_mapped, to_write| is_mapped && (to_write || populates_read);
            for (run, (_, to_write)) in
                runs.filter(|(_, (is_mapped, to_write))| wanted(*is_mapped, *to_write))
            {
                if let Err(error) = self.ram.populate(run.clone(), to_write) {
                    tracing::debug!(?run, %error, "mapped pages not populated");
                }
            }
        }
    }
}

/// The work for the first and the second half of the items, at once where there are two processors.
pub(super) fn in_two<T: Sync, R: Send>(items: &[T], work: impl Fn(&[T]) -> R + Sync) -> [R; 2] {
    let (first, second) = items.split_at(items.len() / 2);
    if !has_two_processors() {
        return [work(first), work(second)];
    }
    std::thread::scope(|scope| {
        let helper = scope.spawn(|| work(second));
        let done = work(first);
        match helper.join() {
            Ok(others) => [done, others],
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Asked once: a process stays where it is.
fn has_two_processors() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| std::thread::available_parallelism().is_ok_and(|n| n.get() > 1))
}
