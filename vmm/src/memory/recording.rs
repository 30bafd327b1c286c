//! What a wake needed up to its first response byte, as the page table tells it.
//!
//! Pages of the mapped image are exact: one is present because the guest or a device touched it, or because it was
//! put in place ahead. What userfaultfd filled came by windows, of which the guest may have touched one page: those
//! windows are tentative. The next wake maps them, and then knows. A set that was put in place unwatched stays, with such windows.

use super::lazy::LazyMemory;
use super::prefetch::of_extents;
use crate::image::{Extent, MAX_BYTES, MAX_DOUBTED_BYTES, bounded};
use crate::pages::{contains, runs_by, union};
use std::io;
use std::ops::Range;

impl LazyMemory {
    /// The set for the next wake, and the end of its recording. Nothing if that was done before. What a run touched that
    /// answered nobody may be far more than a wake needs.
    ///
    /// # Errors
    /// The page table can't be read.
    pub fn take_working_set(&self, has_answered: bool) -> io::Result<Option<Vec<Extent>>> {
        let Some(windows) = self.shared.stop_recording() else {
            return Ok(None);
        };
        Ok(Some(match self.shared.kept.get() {
            Some(kept) if has_answered => self.kept_and(kept, windows)?,
            Some(kept) => kept.clone(),
            None if has_answered => bounded(self.touched(windows)?, MAX_BYTES),
            None => {
                let touched = self.touched(windows)?.into_iter();
                bounded(touched.map(Extent::doubted).collect(), MAX_DOUBTED_BYTES)
            }
        }))
    }

    /// What the page table tells.
    fn touched(&self, windows: Vec<Range<u64>>) -> io::Result<Vec<Extent>> {
        let ram = &self.shared.ram;
        let ahead = self.ahead();
        let (mut mapped, mut written) = (Vec::new(), Vec::new());
        for found in ram.present_pages()? {
            let of_image =
                runs_by(found.pages, |page| ram.is_mapped(page)).filter(|(_, is_mapped)| *is_mapped);
            for (run, _) in of_image {
                if found.own {
                    written.push(run.clone());
                }
                mapped.push(run);
            }
        }
        let faulted = mapped
            .iter()
            .cloned()
            .flatten()
            .filter(|page| !contains(ahead, *page));
        self.shared.note_mapped_faults(faulted.count() as u64);

        let unmapped = |ranges: &[Range<u64>]| without(ranges, |page| ram.is_mapped(page));
        let needed = union([mapped, unmapped(ahead)].concat());
        let mut set = self.tentative(windows, &needed);
        for range in needed {
            let runs = runs_by(range, |page| contains(&written, page));
            set.extend(runs.filter_map(|(run, written)| Some(Extent::new(run)?.with_written(written))));
        }
        Ok(in_order(set))
    }

    /// The set that stays, and what was not in it. Of faults of mapped pages only those can be told that made a copy.
    fn kept_and(&self, kept: &[Extent], windows: Vec<Range<u64>>) -> io::Result<Vec<Extent>> {
        let ram = &self.shared.ram;
        let limit = ram.layout().n_pages();
        let written = union(of_extents(kept, limit, Extent::is_written));
        let copied = ram.own_pages()?.into_iter().flatten();
        let faulted = copied.filter(|page| ram.is_mapped(*page) && !contains(&written, *page));
        self.shared.note_mapped_faults(faulted.count() as u64);

        let mut set = self.tentative(windows, &union(of_extents(kept, limit, |_| true)));
        set.extend_from_slice(kept);
        Ok(bounded(in_order(set), MAX_BYTES))
    }

    /// Pages of windows that nobody knows the guest to need.
    fn tentative(&self, windows: Vec<Range<u64>>, needed: &[Range<u64>]) -> Vec<Extent> {
        let ram = &self.shared.ram;
        let perhaps = without(&union(windows), |page| {
            ram.is_mapped(page) || contains(needed, page)
        });
        let perhaps = perhaps.into_iter().filter_map(Extent::new);
        perhaps.map(Extent::doubted).collect()
    }
}

fn in_order(mut set: Vec<Extent>) -> Vec<Extent> {
    set.sort_unstable_by_key(|extent| extent.pages(u64::MAX).start);
    set
}

/// The ranges without the pages of which something is true.
fn without(ranges: &[Range<u64>], is_out: impl Fn(u64) -> bool) -> Vec<Range<u64>> {
    let runs = ranges.iter().flat_map(|range| runs_by(range.clone(), &is_out));
    runs.filter(|(_, is_out)| !is_out).map(|(run, _)| run).collect()
}
