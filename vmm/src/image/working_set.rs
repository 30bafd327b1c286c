//! The working set: which pages a wake needed up to its first response byte.
//!
//! On disk: number of extents and CRC32C of them, both `u32`, then extents of first page and number of pages,
//! `u32` each. The top bit of the number says that pages of the extent were written, the next one that nobody saw
//! whether they are needed.

use super::WORKING_SET_CAPACITY;
use crate::layout::PAGE_BYTES;
use crate::pages::runs_by;
use std::ops::Range;

/// Most bytes of guest memory in a working set: its pages were touched before the first response byte, and a fault for
/// each costs more than to bring them all.
pub const MAX_BYTES: u64 = 256 << 20;
/// The same for a set of which nobody knows what a wake needs.
pub const MAX_DOUBTED_BYTES: u64 = 64 << 20;
const HEADER_LEN: usize = 8;
const EXTENT_LEN: usize = 8;
/// One in so many windows of a set is made tentative for a watched wake, so that a set forgets what is no longer touched.
const PROBATION_ONE_IN: u64 = 128;
/// Pages of a window that goes on probation.
const PROBATION_PAGES: u64 = 8;
const WRITTEN: u32 = 1 << 31;
const TENTATIVE: u32 = 1 << 30;
const FLAGS: u32 = WRITTEN | TENTATIVE;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    first: u32,
    n_pages: u32,
    written: bool,
    tentative: bool,
}

impl Extent {
    /// The extent of a range, if it is not empty and a machine can have such pages.
    #[must_use]
    pub fn new(pages: Range<u64>) -> Option<Self> {
        let first = u32::try_from(pages.start).ok()?;
        let n_pages = u32::try_from(pages.end.checked_sub(pages.start)?).ok()?;
        (1..TENTATIVE).contains(&n_pages).then_some(Self {
            first,
            n_pages,
            written: false,
            tentative: false,
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

    /// The same pages, of which nobody saw whether a wake needs them, or somebody did.
    #[must_use]
    pub fn with_tentative(self, tentative: bool) -> Self {
        Self { tentative, ..self }
    }

    /// Whether nobody saw that a wake needs them: they are kept at hand, and whether the guest takes them is recorded.
    #[must_use]
    pub fn is_tentative(&self) -> bool {
        self.tentative
    }

    /// The same pages, with nothing known about them.
    #[must_use]
    pub fn doubted(self) -> Self {
        self.with_written(false).with_tentative(true)
    }

    /// Its pages, cut to a RAM of `limit` pages.
    #[must_use]
    pub fn pages(&self, limit: u64) -> Range<u64> {
        let first = u64::from(self.first).min(limit);
        first..(u64::from(self.first) + u64::from(self.n_pages)).min(limit)
    }
}

/// The set for one wake: a part of it, another one every turn, is tentative.
#[must_use]
pub fn with_probation(set: &[Extent], turn: u64) -> Vec<Extent> {
    let on_probation = |page: u64| page / PROBATION_PAGES % PROBATION_ONE_IN == turn % PROBATION_ONE_IN;
    let mut cut = Vec::with_capacity(set.len());
    for extent in set {
        for (run, tentative) in runs_by(extent.pages(u64::MAX), on_probation) {
            let part = Extent::new(run).map(|part| part.with_written(extent.written));
            cut.extend(part.map(|part| part.with_tentative(extent.tentative || tentative)));
        }
    }
    cut
}

/// As much of the set as an image takes and `max_bytes` allow.
#[must_use]
pub fn bounded(set: Vec<Extent>, max_bytes: u64) -> Vec<Extent> {
    let most = usize::try_from(WORKING_SET_CAPACITY)
        .unwrap_or(0)
        .saturating_sub(HEADER_LEN)
        / EXTENT_LEN;
    let mut n_pages = 0;
    let within = |extent: &Extent| {
        n_pages += u64::from(extent.n_pages);
        n_pages * PAGE_BYTES <= max_bytes
    };
    set.into_iter().take_while(within).take(most).collect()
}

/// As on disk.
#[must_use]
pub fn encode_working_set(extents: &[Extent]) -> Vec<u8> {
    let mut body = Vec::with_capacity(extents.len() * EXTENT_LEN);
    for extent in extents {
        body.extend(extent.first.to_le_bytes());
        let written = if extent.written { WRITTEN } else { 0 };
        let tentative = if extent.tentative { TENTATIVE } else { 0 };
        body.extend((extent.n_pages | written | tentative).to_le_bytes());
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
            let end = first + u64::from(count & !FLAGS);
            let extent = (end <= n_pages).then(|| Extent::new(first..end)).flatten()?;
            let extent = extent.with_written(count & WRITTEN != 0);
            Some(extent.with_tentative(count & TENTATIVE != 0))
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
        set[4] = set[4].with_tentative(true);
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
    fn every_page_is_on_probation_once_in_a_while_and_no_page_gets_lost() {
        let set = [Extent::new(3..2000).unwrap().with_written(true)];
        let mut n_times = vec![0; 2000];
        for turn in 0..PROBATION_ONE_IN {
            let cut = with_probation(&set, turn);
            assert!(cut.iter().all(Extent::is_written));
            assert_eq!(cut.iter().flat_map(|part| part.pages(u64::MAX)).count(), 1997);
            for page in cut
                .iter()
                .filter(|part| part.is_tentative())
                .flat_map(|part| part.pages(u64::MAX))
            {
                n_times[usize::try_from(page).unwrap()] += 1;
            }
        }
        assert!(n_times[3..].iter().all(|n| *n == 1));
        let tentative = [Extent::new(0..4).unwrap().with_tentative(true)];
        assert_eq!(with_probation(&tentative, 5), tentative);
    }

    #[test]
    fn a_set_is_bounded_in_bytes() {
        let set = bounded(extents(100_000), MAX_BYTES);
        let n_pages: u64 = set.iter().map(|e| u64::from(e.n_pages)).sum();
        assert!(n_pages * PAGE_BYTES <= MAX_BYTES && n_pages * PAGE_BYTES > MAX_BYTES - (64 << 10));
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
