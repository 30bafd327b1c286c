//! One client of a session: how far it got, and what is queued for it.
//!
//! A client's outbox is bounded by [`Link`]; what does not fit waits in the process's kept output.

use super::link::{Filled, Link};
use super::table::State;
use std::time::Instant;
use torpor_api::guest::{Attached, FrameError, FrameType};

/// Most bytes of one `Stdout` or `Stderr` frame.
const CHUNK_BYTES: usize = 32 << 10;

/// How a client came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It started the process, which ends with it.
    Owner,
    /// It started the process, which outlives it.
    Starter,
    /// It attached.
    Guest,
}

/// A client of a session.
#[derive(Debug)]
pub struct Client {
    /// Its connection.
    pub link: Link,
    /// How it came.
    pub role: Role,
    /// Its `Stdin` frames count.
    pub feeds: bool,
    /// Offset of the next byte of output for it.
    pub cursor: u64,
    /// Its last frame is queued.
    pub is_answered: bool,
    /// When something last moved towards it.
    pub moved: Instant,
    told_input: (u64, bool),
}

impl Client {
    /// A client that gets output from an offset on.
    pub fn new(link: Link, role: Role, feeds: bool, cursor: u64) -> Self {
        Self {
            link,
            role,
            feeds,
            cursor,
            is_answered: false,
            moved: Instant::now(),
            told_input: (0, false),
        }
    }

    /// Queue the first frame.
    pub fn greet(&mut self, pid: u32, serial: u64, input: (u64, bool)) -> Result<(), FrameError> {
        if self.role == Role::Owner {
            return self.link.queue(FrameType::Started, &pid.to_le_bytes());
        }
        self.told_input = input;
        let attached = Attached {
            pid,
            serial,
            offset: self.cursor,
            input_offset: input.0,
            input_ended: input.1,
        };
        let json = serde_json::to_vec(&attached).unwrap_or_default();
        self.link.queue(FrameType::Attached, &json)
    }

    /// Queue what the client has not got yet, as far as there is room, and send what the socket takes.
    pub fn catch_up(&mut self, state: &State) -> Result<Filled, FrameError> {
        if self.feeds && self.role != Role::Owner && self.told_input != state.input {
            self.told_input = state.input;
            let mut payload = [0; 9];
            let (count, ended) = payload.split_at_mut(8);
            count.copy_from_slice(&state.input.0.to_le_bytes());
            ended.copy_from_slice(&[u8::from(state.input.1)]);
            self.link.queue(FrameType::InputTaken, &payload)?;
        }
        // Lost bytes are skipped; the client sees by its own count and the next `Attached` alone, but a client that
        // follows is never overtaken, because reading from the process stops for it.
        self.cursor = self.cursor.max(state.output.begin());
        loop {
            while self.link.has_room()
                && let Some((kind, bytes)) = state.output.chunk(self.cursor, CHUNK_BYTES)
            {
                self.cursor += bytes.len() as u64;
                self.link.queue(kind, &bytes)?;
            }
            let before = self.link.queued_bytes();
            if before == 0 {
                return Ok(Filled::Open);
            }
            let filled = self.link.flush();
            if self.link.queued_bytes() < before {
                self.moved = Instant::now();
            }
            // Only a socket that takes no more tells when to go on.
            if filled == Filled::Closed || self.link.has_output() {
                return Ok(filled);
            }
        }
    }

    /// Queue the last frame, once all output is.
    pub fn answer(&mut self, last_frame: &[u8]) {
        if !self.is_answered {
            self.link.queue_bytes(last_frame);
            self.is_answered = true;
            self.moved = Instant::now();
            self.link.flush();
        }
    }
}
