//! Ranges of page numbers: joined, cut and walked.

use std::ops::Range;

/// The same pages in as few ranges as possible, in order.
pub(crate) fn union(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    bridged(ranges, 0)
}

/// In order, and joined where no more than `gap` pages lie between two: those pages with them.
pub(crate) fn bridged(mut ranges: Vec<Range<u64>>, gap: u64) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(gap) => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Add a range behind all others, joined to the last one if it follows it.
pub(crate) fn push(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => ranges.push(next),
    }
}

/// Whether ranges that are in order have a page.
pub(crate) fn contains(ranges: &[Range<u64>], page: u64) -> bool {
    let after = ranges.partition_point(|range| range.end <= page);
    ranges.get(after).is_some_and(|range| range.contains(&page))
}

/// A range in pieces of at most `n_pages`.
pub(crate) fn pieces(pages: Range<u64>, n_pages: u64) -> impl Iterator<Item = Range<u64>> {
    let step = usize::try_from(n_pages).unwrap_or(1);
    let end = pages.end;
    pages
        .step_by(step)
        .map(move |from| from..(from + n_pages).min(end))
}

/// Runs of pages of one kind, with the kind. A page is looked at when its run is asked for.
pub(crate) fn runs_by<K: PartialEq>(
    pages: Range<u64>,
    kind: impl Fn(u64) -> K,
) -> impl Iterator<Item = (Range<u64>, K)> {
    let mut first = pages.start;
    std::iter::from_fn(move || {
        if first >= pages.end {
            return None;
        }
        let here = kind(first);
        let end = (first + 1..pages.end).find(|page| kind(*page) != here);
        let run = first..end.unwrap_or(pages.end);
        first = run.end;
        Some((run, here))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flat(ranges: &[Range<u64>]) -> Vec<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    #[test]
    fn a_gap_is_bridged_if_it_is_short_enough() {
        let ranges = || vec![20..24, 0..4, 8..10];
        assert_eq!(bridged(ranges(), 4), [0..10, 20..24]);
        assert_eq!(bridged(ranges(), 3), [0..4, 8..10, 20..24]);
    }

    proptest! {
        #[test]
        fn a_union_has_every_page_once(parts in prop::collection::vec((0u64..200, 0u64..20), 0..20)) {
            let ranges: Vec<_> = parts.iter().map(|(start, n)| *start..start + n).collect();
            let mut wanted = flat(&ranges);
            wanted.sort_unstable();
            wanted.dedup();
            let joined = union(ranges);
            prop_assert_eq!(&flat(&joined), &wanted);
            for page in 0..250 {
                prop_assert_eq!(contains(&joined, page), wanted.contains(&page));
            }
        }

        #[test]
        fn pieces_and_runs_are_the_range(start in 0u64..100, n in 0u64..100, step in 1u64..10) {
            let range = start..start + n;
            let cut: Vec<_> = pieces(range.clone(), step).collect();
            prop_assert!(cut.iter().all(|piece| (1..=step).contains(&(piece.end - piece.start))));
            prop_assert_eq!(flat(&cut), range.clone().collect::<Vec<_>>());
            let runs: Vec<_> = runs_by(range.clone(), |page| page / step).collect();
            prop_assert!(runs.iter().all(|(run, kind)| run.clone().all(|page| page / step == *kind)));
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 != pair[1].1));
            let runs: Vec<_> = runs.into_iter().map(|(run, _)| run).collect();
            prop_assert_eq!(flat(&runs), range.collect::<Vec<_>>());
        }
    }
}
