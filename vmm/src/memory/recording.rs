//! What a wake needed up to its first response byte, as the page table tells it.
//!
//! Pages of the mapped image are exact: one is present because the guest or a device touched it, or because it was
//! put in place ahead. What userfaultfd filled came by windows, of which the guest may have touched one page: those
//! windows are tentative. The next wake maps them, and then knows.

use super::lazy::LazyMemory;
use crate::image::{Extent, MAX_BYTES, bounded};
use crate::pages::{contains, runs_by, union};
use std::io;
use std::ops::Range;

impl LazyMemory {
    /// The set for the next wake, and the end of its recording. Nothing if that was done before.
    ///
    /// # Errors
    /// The page table can't be read.
    pub fn take_working_set(&self) -> io::Result<Option<Vec<Extent>>> {
        let Some(windows) = self.shared.stop_recording() else {
            return Ok(None);
        };
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
        let perhaps = without(&union(windows), |page| {
            ram.is_mapped(page) || contains(&needed, page)
        });
        let mut set: Vec<Extent> = perhaps
            .into_iter()
            .filter_map(Extent::new)
            .map(|extent| extent.with_tentative(true))
            .collect();
        for range in needed {
            let runs = runs_by(range, |page| contains(&written, page));
            set.extend(runs.filter_map(|(run, written)| Some(Extent::new(run)?.with_written(written))));
        }
        set.sort_unstable_by_key(|extent| extent.pages(u64::MAX).start);
        Ok(Some(bounded(set, MAX_BYTES)))
    }
}

/// The ranges without the pages of which something is true.
fn without(ranges: &[Range<u64>], is_out: impl Fn(u64) -> bool) -> Vec<Range<u64>> {
    let runs = ranges.iter().flat_map(|range| runs_by(range.clone(), &is_out));
    runs.filter(|(_, is_out)| !is_out).map(|(run, _)| run).collect()
}
