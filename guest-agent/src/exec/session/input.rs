//! From clients to the process: its input, its terminal's size, signals.

use super::super::link::{Frame, is_transient};
use super::Session;
use crate::children::SignalError;
use crate::exec::ExecError;
use crate::sys::terminal;
use std::io::Write;
use torpor_api::guest::{FrameType, WindowSize};

/// Frames are taken from clients only while less than this waits for the process.
const INPUT_BYTES: usize = 256 << 10;
/// End of transmission, which is how a terminal says end of file.
const END_OF_TRANSMISSION: u8 = 4;

impl Session<'_> {
    pub(super) fn wants_input(&self) -> bool {
        self.input.len() < INPUT_BYTES
    }

    /// Handle what a client has sent, as far as there is room for it.
    pub(super) fn handle_frames(&mut self, index: usize) -> Result<(), ExecError> {
        while self.wants_input()
            && let Some(client) = self.clients.get_mut(index)
        {
            let frame = client
                .link
                .next_frame()
                .map_err(|error| ExecError::Protocol(error.to_string()))?;
            let Some(frame) = frame else { break };
            let feeds = client.feeds;
            self.handle_frame(&frame, feeds)?;
        }
        self.end_input_if_done();
        Ok(())
    }

    fn handle_frame(&mut self, frame: &Frame, feeds: bool) -> Result<(), ExecError> {
        let bad = |message: &str| ExecError::Protocol(message.to_owned());
        match frame.kind {
            FrameType::Stdin | FrameType::StdinEof if !feeds => {
                Err(bad("another client gives this process its input"))
            }
            FrameType::Stdin => {
                self.take_input(&frame.payload)?;
                self.process.state().input.0 += frame.payload.len() as u64;
                Ok(())
            }
            FrameType::StdinEof => {
                // Nothing to end is no error: the client need not know.
                if self.takes_input {
                    self.take_input_end()?;
                }
                self.process.state().input.1 = true;
                Ok(())
            }
            FrameType::Resize => {
                let size = serde_json::from_slice::<WindowSize>(&frame.payload);
                self.resize(size.map_err(|error| bad(&format!("no window size: {error}")))?)
            }
            FrameType::Signal => self.signal(&frame.payload),
            other => Err(bad(&format!("{other:?} is no frame of an exec's client"))),
        }
    }

    pub(super) fn take_input(&mut self, bytes: &[u8]) -> Result<(), ExecError> {
        let bad = |message: &str| Err(ExecError::Protocol(message.to_owned()));
        if !self.takes_input {
            return bad("this exec takes no standard input");
        }
        if self.input_ended {
            return bad("standard input after its end");
        }
        if self.streams.input.is_some() {
            self.input.extend_from_slice(bytes);
        }
        Ok(())
    }

    pub(super) fn take_input_end(&mut self) -> Result<(), ExecError> {
        if !self.takes_input {
            return Err(ExecError::Protocol(
                "this exec takes no standard input".to_owned(),
            ));
        }
        if !self.input_ended && self.streams.controller.is_some() {
            self.input.push(END_OF_TRANSMISSION);
        }
        // A terminal goes on after its end of file.
        self.input_ended = self.streams.controller.is_none();
        Ok(())
    }

    pub(super) fn resize(&mut self, size: WindowSize) -> Result<(), ExecError> {
        let controller = self.streams.controller.as_ref();
        let controller =
            controller.ok_or_else(|| ExecError::Protocol("this exec has no terminal".to_owned()))?;
        terminal::resize(controller, size).map_err(ExecError::os("resize a terminal"))?;
        self.process.state().tty = Some(size);
        Ok(())
    }

    fn signal(&self, payload: &[u8]) -> Result<(), ExecError> {
        let number = <[u8; 4]>::try_from(payload).map(u32::from_le_bytes).ok();
        let number = number.and_then(|number| i32::try_from(number).ok());
        let number = number.ok_or_else(|| ExecError::Protocol("a signal is four bytes".to_owned()))?;
        match self.execs.children.signal(self.child.pid(), number) {
            // Too late is not wrong: the client could not know.
            Ok(()) | Err(SignalError::Unknown(_) | SignalError::Refused { .. }) => Ok(()),
            Err(error @ SignalError::NoSignal(_)) => Err(ExecError::Protocol(error.to_string())),
        }
    }

    pub(super) fn feed_process(&mut self) {
        let Some(mut input) = self.streams.input.as_ref() else {
            return;
        };
        match input.write(&self.input) {
            Ok(n) => drop(self.input.drain(..n)),
            Err(error) if is_transient(&error) => {}
            Err(_) => {
                // The process closed its end: it wants no more, which is no error.
                self.input.clear();
                self.streams.input = None;
            }
        }
        // What a client sent while there was no room has waited in its inbox.
        for index in (0..self.clients.len()).rev() {
            self.hear_client(index, nix::poll::PollFlags::empty());
        }
        self.end_input_if_done();
    }

    pub(super) fn end_input_if_done(&mut self) {
        if self.input_ended && self.input.is_empty() && self.streams.controller.is_none() {
            self.streams.input = None;
        }
    }
}
