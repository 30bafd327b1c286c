//! What is on its way to a process: kept until the guest has said that it took it.

use bytes::Bytes;
use std::collections::VecDeque;
use torpor_api::guest::{FrameType, WindowSize};

/// Most bytes that are kept.
const KEPT_BYTES: usize = 256 << 10;
/// Most bytes of one frame.
const CHUNK_BYTES: usize = 32 << 10;

/// Input, size and signals.
#[derive(Debug)]
pub(super) struct Input {
    /// Offset of the first byte that is kept.
    begin: u64,
    kept: VecDeque<u8>,
    /// How many of them this connection has carried.
    sent: usize,
    closed: bool,
    close_sent: bool,
    close_taken: bool,
    size: Option<WindowSize>,
    size_sent: bool,
    signals: VecDeque<u32>,
}

impl Input {
    pub(super) fn new(begin: u64) -> Self {
        Self {
            begin,
            kept: VecDeque::new(),
            sent: 0,
            closed: false,
            close_sent: false,
            close_taken: false,
            size: None,
            size_sent: true,
            signals: VecDeque::new(),
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.kept.len() < KEPT_BYTES && self.signals.len() < 64
    }

    /// Is there anything that the guest has not taken?
    pub(super) fn is_wanting(&self) -> bool {
        !self.kept.is_empty() || (self.closed && !self.close_taken) || !self.signals.is_empty()
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        if !self.closed {
            self.kept.extend(bytes);
        }
    }

    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    pub(super) fn resize(&mut self, size: WindowSize) {
        self.size = Some(size);
        self.size_sent = false;
    }

    pub(super) fn signal(&mut self, signal: u32) {
        self.signals.push_back(signal);
    }

    /// A new connection, whose guest has taken so much. What it took and never said so is not sent again.
    pub(super) fn begin_again(&mut self, taken: u64, ended: bool) {
        self.taken(taken, ended);
        self.sent = 0;
        self.close_sent = self.close_taken;
        self.size_sent = self.size.is_none();
    }

    /// The guest has taken everything up to this offset.
    pub(super) fn taken(&mut self, offset: u64, ended: bool) {
        let taken = usize::try_from(offset.saturating_sub(self.begin)).unwrap_or(usize::MAX);
        let taken = taken.min(self.kept.len());
        self.kept.drain(..taken);
        self.sent = self.sent.saturating_sub(taken);
        self.begin += taken as u64;
        self.close_taken |= ended && self.closed;
    }

    pub(super) fn has_frame(&self) -> bool {
        !self.signals.is_empty()
            || !self.size_sent
            || self.sent < self.kept.len()
            || (self.closed && !self.close_sent)
    }

    /// The next frame for the guest.
    pub(super) fn next_frame(&mut self) -> Option<(FrameType, Bytes)> {
        if let Some(signal) = self.signals.pop_front() {
            return Some((FrameType::Signal, signal.to_le_bytes().to_vec().into()));
        }
        if !self.size_sent {
            self.size_sent = true;
            let json = serde_json::to_vec(&self.size?).unwrap_or_default();
            return Some((FrameType::Resize, json.into()));
        }
        let end = self.kept.len().min(self.sent + CHUNK_BYTES);
        if self.sent < end {
            let chunk: Vec<u8> = self.kept.range(self.sent..end).copied().collect();
            self.sent = end;
            return Some((FrameType::Stdin, chunk.into()));
        }
        if self.closed && !self.close_sent {
            self.close_sent = true;
            return Some((FrameType::StdinEof, Bytes::new()));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a guest does that loses every connection at some point.
    #[derive(Default)]
    struct Guest {
        got: Vec<u8>,
        ended: bool,
    }

    proptest! {
        #[test]
        fn a_guest_gets_every_byte_once_whenever_connections_break(
            writes in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100_000), 0..6),
            breaks in proptest::collection::vec((0usize..8, any::<bool>()), 0..8),
        ) {
            let mut input = Input::new(7);
            let mut guest = Guest::default();
            let mut breaks = breaks.into_iter();
            for bytes in &writes {
                input.write(bytes);
            }
            input.close();
            while input.is_wanting() {
                let (n_frames, is_told) = breaks.next().unwrap_or((usize::MAX, true));
                for _ in 0..n_frames {
                    let Some((kind, payload)) = input.next_frame() else { break };
                    match kind {
                        FrameType::Stdin => guest.got.extend(&payload),
                        FrameType::StdinEof => guest.ended = true,
                        other => prop_assert!(false, "{:?}", other),
                    }
                    if is_told {
                        input.taken(7 + guest.got.len() as u64, guest.ended);
                    }
                }
                input.begin_again(7 + guest.got.len() as u64, guest.ended);
            }
            prop_assert!(guest.ended);
            prop_assert_eq!(guest.got, writes.concat());
        }
    }

    #[test]
    fn only_the_last_size_is_sent_and_once_in_every_connection() {
        let mut input = Input::new(0);
        input.resize(WindowSize { rows: 1, cols: 1 });
        input.resize(WindowSize { rows: 2, cols: 3 });
        let resize = (FrameType::Resize, Bytes::from_static(br#"{"rows":2,"cols":3}"#));
        assert_eq!(input.next_frame(), Some(resize.clone()));
        assert_eq!(input.next_frame(), None);
        assert!(!input.is_wanting());
        input.begin_again(0, false);
        assert_eq!(input.next_frame(), Some(resize));
    }
}
