//! The end of a process's output, under absolute offsets.
//!
//! Standard output and standard error are one sequence of bytes in the order in which they were read, so that a
//! client can say with one number how far it got. What is over [`KEPT_BYTES`] is dropped from the front.

use std::collections::VecDeque;
use torpor_api::guest::FrameType;

/// Most bytes kept of a running process.
pub const KEPT_BYTES: usize = 1 << 20;
/// What a change between the two streams counts as, so that a process that alternates is bounded too.
const SEGMENT_BYTES: usize = 24;

/// Bytes of one stream that follow each other.
#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: FrameType,
    begin: u64,
}

/// What is kept.
#[derive(Debug, Default)]
pub struct KeptOutput {
    bytes: VecDeque<u8>,
    segments: VecDeque<Segment>,
    end: u64,
}

impl KeptOutput {
    /// Add what was read from a stream.
    pub fn push(&mut self, kind: FrameType, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if self.segments.back().is_none_or(|last| last.kind != kind) {
            self.segments.push_back(Segment {
                kind,
                begin: self.end,
            });
        }
        self.bytes.extend(bytes);
        self.end += bytes.len() as u64;
        self.trim(KEPT_BYTES);
    }

    /// Keep no more than so many bytes.
    pub fn trim(&mut self, kept_bytes: usize) {
        while self.size() > kept_bytes {
            let excess = (self.size() - kept_bytes).min(self.bytes.len());
            let first_len = self.segments.get(1).map_or(self.end, |next| next.begin) - self.begin();
            let first_len = usize::try_from(first_len).unwrap_or(usize::MAX);
            if excess >= first_len {
                self.bytes.drain(..first_len);
                self.segments.pop_front();
            } else {
                self.bytes.drain(..excess);
                break;
            }
        }
        if let Some(first) = self.segments.front_mut() {
            first.begin = self.end - self.bytes.len() as u64;
        }
    }

    /// Give memory back that a shrunken output no longer needs.
    pub fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.segments.shrink_to_fit();
    }

    /// What this costs, about.
    pub fn size(&self) -> usize {
        self.bytes.len() + self.segments.len() * SEGMENT_BYTES
    }

    /// Offset of the first byte that is kept.
    pub fn begin(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Offset after the last byte.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes of one stream from an offset on, at most so many; nothing at the end. An offset before the beginning
    /// is one at the beginning.
    pub fn chunk(&self, offset: u64, most: usize) -> Option<(FrameType, Vec<u8>)> {
        let offset = offset.max(self.begin());
        if offset >= self.end {
            return None;
        }
        let after = self.segments.partition_point(|segment| segment.begin <= offset);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        let segment_end = self.segments.get(after).map_or(self.end, |next| next.begin);
        let from = usize::try_from(offset - self.begin()).ok()?;
        let len = usize::try_from(segment_end - offset)
            .unwrap_or(usize::MAX)
            .min(most);
        Some((
            segment.kind,
            self.bytes.range(from..from + len).copied().collect(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(output: &KeptOutput, mut offset: u64, most: usize) -> Vec<(FrameType, u8)> {
        let mut seen = Vec::new();
        while let Some((kind, bytes)) = output.chunk(offset, most) {
            assert!(!bytes.is_empty() && bytes.len() <= most);
            offset = offset.max(output.begin()) + bytes.len() as u64;
            seen.extend(bytes.into_iter().map(|byte| (kind, byte)));
        }
        seen
    }

    proptest! {
        #[test]
        fn what_is_kept_is_the_end_of_what_was_written(
            writes in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..50)), 0..40),
            kept in 0usize..600,
            most in 1usize..40,
        ) {
            let mut output = KeptOutput::default();
            let mut all = Vec::new();
            for (is_err, bytes) in writes {
                let kind = if is_err { FrameType::Stderr } else { FrameType::Stdout };
                output.push(kind, &bytes);
                all.extend(bytes.into_iter().map(|byte| (kind, byte)));
                output.trim(kept);
            }
            prop_assert!(output.size() <= kept);
            prop_assert_eq!(output.end(), all.len() as u64);
            let begin = usize::try_from(output.begin()).unwrap();
            prop_assert_eq!(read(&output, 0, most), &all[begin..]);
            let middle = (begin + all.len()) / 2;
            prop_assert_eq!(read(&output, middle as u64, most), &all[middle..]);
            prop_assert_eq!(output.chunk(output.end(), most), None);
        }
    }

    #[test]
    fn a_busy_process_keeps_no_more_than_the_bound() {
        let mut output = KeptOutput::default();
        for _ in 0..100 {
            output.push(FrameType::Stdout, &[7; 64 << 10]);
        }
        assert!(output.size() <= KEPT_BYTES && output.size() > KEPT_BYTES / 2);
        assert_eq!(output.end(), 100 * (64 << 10));
    }
}
