//! The working set of a guest that is known well enough, put in place without a watch on what it touches.
//!
//! The image is mapped first, and its pages are checked where the guest will find them. That brings them into the page table, and
//! by the kernel's own way of doing so, up to 16 at a time, the pages that lie between with them: half the page faults of a watched
//! restore, and the image is in no second page table for the check. The price is that the page table does not tell what
//! was touched, so the set stays what it is, but for what came by userfaultfd.
//!
//! Pages that will be written are copied before anything else is brought in, because taking a page out of the page table again,
//! and out of KVM's, costs more. What is checked of them is the copy.

use super::lazy::{FillError, Kind, LazyMemory, Shared};
use super::prefetch::{
    BATCH_PAGES, LONG_ZERO_RUN_PAGES, MAX_MAPPINGS, Placement, Prefetched, in_two, of_extents,
};
use crate::image::{Extent, in_one_file};
use crate::pages::{bridged, contains, pieces, runs_by, union};
use std::ops::Range;
use std::time::Instant;

/// Pages between two that are needed that get into the second-level page table with them: a call costs as much as three pages.
const CALL_GAP_PAGES: u64 = 2;

impl LazyMemory {
    /// Map these ranges, which hold the extents, and check them.
    pub(super) fn lay_out_unwatched(
        &self,
        extents: &[Extent],
        ranges: Vec<Range<u64>>,
    ) -> Result<Prefetched, FillError> {
        let shared = &self.shared;
        let limit = shared.ram.layout().n_pages();
        let to_map = shared.mappable(ranges)?;
        // Set once, like the next two: memory is put in place ahead once.
        let to_map = shared.mapped.get_or_init(|| to_map);
        for pages in to_map {
            shared.map(pages)?;
        }
        let mapped = Instant::now();
        let _ = shared.kept.set(extents.to_vec());
        shared.ahead.get_or_init(|| {
            let needed = of_extents(extents, limit, |extent| !extent.is_tentative());
            let within = |call| runs_by(call, |page| contains(to_map, page));
            let calls = bridged(needed, CALL_GAP_PAGES).into_iter().flat_map(within);
            calls.filter(|(_, is_in)| *is_in).map(|(run, _)| run).collect()
        });
        let written = union(of_extents(extents, limit, Extent::is_written));
        in_two(&written, |ranges| shared.populate(ranges, &written, false));
        let populated = Instant::now();
        for checked in in_two(to_map, |ranges| shared.check_mapped(ranges)) {
            checked?;
        }
        Ok(Prefetched {
            n_pages: to_map.iter().map(|pages| pages.end - pages.start).sum(),
            mapped,
            populated,
            checked: Instant::now(),
        })
    }
}

impl Shared {
    /// What can be mapped of these ranges, in order, each from one file. Long runs of zero pages are put in place at once.
    fn mappable(&self, ranges: Vec<Range<u64>>) -> Result<Vec<Range<u64>>, FillError> {
        let mut to_map = Vec::new();
        let parts = ranges
            .into_iter()
            .flat_map(|range| in_one_file(&*self.source, range));
        let parts = parts.flat_map(|part| runs_by(part, |page| self.kind(page)));
        for (part, _) in parts.filter(|(_, kind)| *kind == Kind::InImage) {
            // What is too much is filled when it is touched.
            if to_map.len() >= MAX_MAPPINGS || self.source.file(part.start).is_none() {
                break;
            }
            if !self.may_have_zeros(&part, LONG_ZERO_RUN_PAGES)? {
                self.count_pages(part.end - part.start);
                self.push_mapping(&mut to_map, part);
                continue;
            }
            let batches: Vec<_> = pieces(part, BATCH_PAGES).collect();
            for pages in self.fetch(&batches, Placement::Mapped, None)?.to_map {
                self.push_mapping(&mut to_map, pages);
            }
        }
        Ok(to_map)
    }

    fn check_mapped(&self, ranges: &[Range<u64>]) -> Result<(), FillError> {
        for pages in ranges {
            // SAFETY: memory is put in place for a guest that does not run yet, after its vCPUs took over their state and before
            // its devices do; userfaultfd fills only what is not mapped.
            let bytes = unsafe { self.ram.bytes(pages) };
            let checked = self
                .source
                .verify(pages.start, bytes.map_err(FillError::place(pages))?);
            checked.map_err(FillError::source(pages))?;
        }
        Ok(())
    }
}
