//! The working set: which pages a wake needed up to its first response byte.
//!
//! On disk: number of extents and CRC32C of them, both `u32`, then extents of first page and number of pages,
//! `u32` each, in order of the first touch. The top bit of the number says that pages of the extent were written.

use super::WORKING_SET_CAPACITY;
use crate::pages::runs_by;
use std::collections::HashSet;
use std::ops::Range;

/// Most bytes of guest memory in a working set.
pub const MAX_BYTES: u64 = 64 << 20;
const HEADER_LEN: usize = 8;
const EXTENT_LEN: usize = 8;
/// One part in so many of the previous set is left out of the next: it comes back with one fault if it is still
/// needed, and is gone if not. So a set forgets what is no longer touched.
const FORGET_ONE_IN: u64 = 64;
const WRITTEN: u32 = 1 << 31;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    first: u32,
    n_pages: u32,
    written: bool,
}

impl Extent {
    /// The extent of a range, if it is not empty and a machine can have such pages.
    #[must_use]
    pub fn new(pages: Range<u64>) -> Option<Self> {
        let first = u32::try_from(pages.start).ok()?;
        let n_pages = u32::try_from(pages.end.checked_sub(pages.start)?).ok()?;
        (1..WRITTEN).contains(&n_pages).then_some(Self {
            first,
            n_pages,
            written: false,
        })
    }

    /// The same pages, known to be written before the first response byte, or not.
    #[must_use]
    pub fn with_written(self, written: bool) -> Self {
        Self { written, ..self }
    }

    /// Whether pages of it were written before the first response byte.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.written
    }

    /// Its pages, cut to a RAM of `limit` pages.
    #[must_use]
    pub fn pages(&self, limit: u64) -> Range<u64> {
        let first = u64::from(self.first).min(limit);
        first..(u64::from(self.first) + u64::from(self.n_pages)).min(limit)
    }
}

/// The set for the next wake: what was touched in this run, then what the last set had, but for a rotating part.
#[must_use]
pub fn merge_working_set(previous: &[Extent], touched: &[Extent], generation: u64) -> Vec<Extent> {
    let mut seen = HashSet::new();
    let mut n_pages = 0;
    let kept = previous
        .iter()
        .zip(0u64..)
        .filter(|(_, index)| index % FORGET_ONE_IN != generation % FORGET_ONE_IN);
    let all = touched.iter().chain(kept.map(|(extent, _)| extent));
    let most = usize::try_from(WORKING_SET_CAPACITY)
        .unwrap_or(0)
        .saturating_sub(HEADER_LEN)
        / EXTENT_LEN;
    all.filter(|extent| seen.insert((extent.first, extent.n_pages)))
        .take_while(|extent| {
            n_pages += u64::from(extent.n_pages);
            n_pages * crate::layout::PAGE_BYTES <= MAX_BYTES
        })
        .take(most)
        .copied()
        .collect()
}

/// The same pages, cut into extents that were written and extents that were not: the next wake copies the former
/// ahead of the guest's write to them.
#[must_use]
pub fn mark_written(extents: &[Extent], n_pages: u64, is_written: impl Fn(u64) -> bool) -> Vec<Extent> {
    let mut marked = Vec::with_capacity(extents.len());
    for extent in extents {
        for (run, written) in runs_by(extent.pages(n_pages), &is_written) {
            marked.extend(Extent::new(run).map(|part| part.with_written(written)));
        }
    }
    marked
}

/// As on disk.
#[must_use]
pub fn encode_working_set(extents: &[Extent]) -> Vec<u8> {
    let mut body = Vec::with_capacity(extents.len() * EXTENT_LEN);
    for extent in extents {
        body.extend(extent.first.to_le_bytes());
        let flag = if extent.written { WRITTEN } else { 0 };
        body.extend((extent.n_pages | flag).to_le_bytes());
    }
    let mut bytes = u32::try_from(extents.len()).unwrap_or(0).to_le_bytes().to_vec();
    bytes.extend(crc32c::crc32c(&body).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// From disk; nothing if it is damaged or names pages that the machine does not have.
#[must_use]
pub fn decode_working_set(bytes: &[u8], n_pages: u64) -> Option<Vec<Extent>> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, body) = rest.split_first_chunk::<4>()?;
    let len = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(EXTENT_LEN)?;
    if body.len() != len || crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
        return None;
    }
    body.chunks_exact(EXTENT_LEN)
        .map(|chunk| {
            let (first, count) = chunk.split_first_chunk::<4>()?;
            let first = u64::from(u32::from_le_bytes(*first));
            let count = u32::from_le_bytes(count.try_into().ok()?);
            let end = first + u64::from(count & !WRITTEN);
            let extent = (end <= n_pages).then(|| Extent::new(first..end)).flatten()?;
            Some(extent.with_written(count & WRITTEN != 0))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extents(n: u64) -> Vec<Extent> {
        (0..n).filter_map(|i| Extent::new(i * 16..i * 16 + 16)).collect()
    }

    #[test]
    fn a_set_survives_the_disk_and_a_damaged_one_does_not() {
        let mut set = extents(10);
        set[3] = set[3].with_written(true);
        let bytes = encode_working_set(&set);
        assert_eq!(decode_working_set(&bytes, 160).unwrap(), set);
        assert_eq!(decode_working_set(&bytes, 159), None);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(decode_working_set(&damaged, 160), None, "byte {at}");
        }
    }

    #[test]
    fn what_is_never_touched_again_is_forgotten_and_what_is_touched_stays() {
        let mut set = extents(64);
        let touched = [Extent::new(3 * 16..4 * 16).unwrap()];
        for generation in 0..4096 {
            set = merge_working_set(&set, &touched, generation);
        }
        assert_eq!(set, touched);
    }

    #[test]
    fn marking_cuts_extents_where_written_begins_and_ends() {
        let extents = [Extent::new(4..8).unwrap(), Extent::new(0..4).unwrap()];
        let marked = mark_written(&extents, 6, |page| (3..6).contains(&page));
        let expected = [(4..6, true), (0..3, false), (3..4, true)]
            .map(|(pages, written)| Extent::new(pages).unwrap().with_written(written));
        assert_eq!(marked, expected);
    }

    #[test]
    fn a_set_is_bounded_in_bytes() {
        let set = merge_working_set(&extents(100_000), &[], 1);
        let n_pages: u64 = set.iter().map(|e| u64::from(e.n_pages)).sum();
        assert!(n_pages * 4096 <= MAX_BYTES && n_pages * 4096 > MAX_BYTES - (64 << 10));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_pages_of_the_machine_or_to_nothing(
            bytes in prop::collection::vec(any::<u8>(), 0..200)
        ) {
            if let Some(set) = decode_working_set(&bytes, 1000) {
                prop_assert!(set.iter().all(|e| e.pages(u64::MAX).end <= 1000));
            }
        }
    }
}
