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
use crate::layout::{PAGE_BYTES, PAGE_SIZE};
use crate::pages::{bridged, contains, pieces, push, runs_by, union};
use crate::sys::file_view::FileView;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Instant;

/// Pages read and checked at once.
const BATCH_PAGES: u64 = 64;
/// Pages between two parts of the working set that are checked and mapped with them. Another mapping costs as much as
/// checking about 12 pages, in the virtual host and on metal; the rest is for what the guest touches after its first
/// answer, which it finds mapped: with 12, a wake was no faster, and a fifth more pages had to be copied until the next pause.
const GAP_PAGES: u64 = 32;
/// The same for an image that has to come from the disk: reading a page costs far more than a mapping then.
const COLD_GAP_PAGES: u64 = 4;
/// An image counts as one that has to come from the disk if one page in so many is not in the page cache.
const COLD_FROM_ONE_IN: u64 = 8;
/// A run of zero pages shorter than this between others is mapped with them: every run costs a mapping, and every page a
/// place in the page table.
const LONG_ZERO_RUN_PAGES: u64 = 32;
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

/// What was put in place, and when each step was done.
#[derive(Debug, Clone, Copy)]
pub struct Prefetched {
    /// Pages.
    pub n_pages: u64,
    /// All were read and checked, or copied.
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
        let of_extents = |is_wanted: fn(&Extent) -> bool| {
            let wanted = extents.iter().filter(|extent| is_wanted(extent));
            wanted.map(|extent| extent.pages(limit)).collect()
        };
        let ranges = match placement {
            Placement::Copied => union(of_extents(|_| true)),
            Placement::Mapped => bridged(of_extents(|_| true), GAP_PAGES),
        };
        let on_disk = shared.on_disk(&ranges);
        let (ranges, view) = if on_disk.is_empty() {
            (ranges, shared.source.view())
        } else {
            (bridged(of_extents(|_| true), COLD_GAP_PAGES), None)
        };
        for range in ranges
            .iter()
            .filter(|range| on_disk.iter().any(|cold| cold.contains(&range.start)))
        {
            shared.source.will_need(range.clone());
        }
        let batches: Vec<_> = ranges
            .into_iter()
            .flat_map(|range| pieces(range, BATCH_PAGES))
            .collect();
        let (mut n_pages, mut to_map) = (0, Vec::new());
        for fetched in in_two(&batches, |batches| {
            shared.fetch(batches, placement, view.as_ref())
        }) {
            let fetched = fetched?;
            n_pages += fetched.n_pages;
            for pages in fetched.to_map {
                push(&mut to_map, pages);
            }
        }
        let checked = Instant::now();
        // By one thread: mappings exclude each other and all page faults of the process.
        for pages in to_map {
            shared.map(pages)?;
        }
        let mapped = Instant::now();
        // Set once: memory is put in place ahead once.
        let certain = || union(of_extents(|extent| !extent.is_tentative()));
        let ahead = shared.ahead.get_or_init(certain);
        let written = union(of_extents(Extent::is_written));
        in_two(ahead, |ranges| shared.populate(ranges, &written, populates_read));
        Ok(Prefetched {
            n_pages,
            checked,
            mapped,
            populated: Instant::now(),
        })
    }

    /// Pages of the working set that the guest is known to need, in order.
    #[must_use]
    pub fn ahead(&self) -> &[Range<u64>] {
        self.shared.ahead.get().map_or(&[], Vec::as_slice)
    }
}

/// What one thread read and checked.
#[derive(Default)]
struct Fetched {
    n_pages: u64,
    /// Pages that are to be mapped, in order.
    to_map: Vec<Range<u64>>,
}

impl Shared {
    /// The ranges of which the disk has something that the page cache has not, if it is not next to nothing.
    fn on_disk(&self, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
        let missing = ranges
            .iter()
            .map(|range| (range.clone(), self.source.n_on_disk(range.clone())));
        let missing: Vec<_> = missing.collect();
        let n_pages: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        let n_missing: u64 = missing.iter().map(|(_, n_missing)| n_missing).sum();
        if n_missing * COLD_FROM_ONE_IN <= n_pages {
            return Vec::new();
        }
        let on_disk = missing.into_iter().filter(|(_, n_missing)| *n_missing > 0);
        on_disk.map(|(range, _)| range).collect()
    }

    fn fetch(
        &self,
        batches: &[Range<u64>],
        placement: Placement,
        view: Option<&FileView>,
    ) -> Result<Fetched, FillError> {
        let (mut buffer, mut fetched) = (Vec::new(), Fetched::default());
        for pages in batches {
            let may_map = placement == Placement::Mapped
                && fetched.to_map.len() < MAX_MAPPINGS / 2
                && self.source.file(pages.start).is_some();
            if !may_map {
                fetched.n_pages += self.fill(pages.clone(), room(&mut buffer, pages))?;
                continue;
            }
            let runs = runs_by(pages.clone(), |page| self.kind(page));
            for (run, _) in runs.filter(|(_, kind)| *kind == Kind::InImage) {
                fetched.n_pages += run.end - run.start;
                self.check(run, view, &mut buffer, &mut fetched.to_map)?;
            }
        }
        Ok(fetched)
    }

    /// Check missing pages; long runs of zeros are put in place at once, the others are to be mapped.
    fn check(
        &self,
        pages: Range<u64>,
        view: Option<&FileView>,
        buffer: &mut Vec<u8>,
        to_map: &mut Vec<Range<u64>>,
    ) -> Result<(), FillError> {
        let failed = |source| FillError::Source {
            first: pages.start,
            end: pages.end,
            source,
        };
        let content = match view {
            Some(view) => self.source.check(pages.clone(), view).map_err(failed)?,
            None => {
                let buffer = room(buffer, &pages);
                self.source.read(pages.start, buffer).map_err(failed)?;
                buffer
            }
        };
        self.count_pages(pages.end - pages.start);
        let mut first = pages.start;
        for run in runs(content) {
            let end = first + (run.bytes.len() / PAGE_SIZE) as u64;
            if run.zero && end - first >= LONG_ZERO_RUN_PAGES {
                self.place_zeros(first..end)?;
                self.filled.set(first..end);
            } else {
                push(to_map, first..end);
            }
            first = end;
        }
        Ok(())
    }

    fn map(&self, pages: Range<u64>) -> Result<(), FillError> {
        let failed = |source| FillError::Place {
            first: pages.start,
            end: pages.end,
            source,
        };
        let unmappable = || failed(std::io::ErrorKind::Unsupported.into());
        let (file, offset) = self.source.file(pages.start).ok_or_else(unmappable)?;
        self.ram.map_file(pages.clone(), file, offset).map_err(failed)?;
        let len_bytes = (pages.end - pages.start) * PAGE_BYTES;
        let start = self.ram.hva(pages.start * PAGE_BYTES);
        if let Err(error) = self.uffd.map_single_pages(start, len_bytes) {
            tracing::debug!(?pages, %error, "working set will be recorded with neighbours of touched pages");
        }
        self.filled.set(pages);
        Ok(())
    }

    /// Bring pages of the mapped image into the page table, so that KVM and the guest find them there; those that
    /// will be written, as copies.
    ///
    /// Best effort: a page that can't be brought now is brought, or refused, when it is touched.
    fn populate(&self, ranges: &[Range<u64>], written: &[Range<u64>], populates_read: bool) {
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

/// As much of a buffer as the pages take.
fn room<'a>(buffer: &'a mut Vec<u8>, pages: &Range<u64>) -> &'a mut [u8] {
    let len = PAGE_SIZE * usize::try_from(pages.end - pages.start).unwrap_or(0);
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

/// The work for the first and the second half of the items, at once where there are two processors.
fn in_two<T: Sync, R: Send>(items: &[T], work: impl Fn(&[T]) -> R + Sync) -> [R; 2] {
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
