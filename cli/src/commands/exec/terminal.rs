//! The terminal that the user sits at: its size, and keys that go to the machine as they are.

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, IsTerminal};
use torpor_api::guest::WindowSize;

const USUAL: WindowSize = WindowSize { rows: 24, cols: 80 };

/// Size of the terminal on standard output, or what is usual.
pub(super) fn size() -> WindowSize {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => WindowSize {
            rows: size.ws_row,
            cols: size.ws_col,
        },
        Ok(_) | Err(_) => USUAL,
    }
}

/// Keys go through as they are until this is dropped.
pub(super) struct RawKeys(Termios);

impl RawKeys {
    /// `None` if standard input is no terminal.
    pub(super) fn take() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawKeys {
    fn drop(&mut self) {
        // A terminal that is gone needs no keys.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}
