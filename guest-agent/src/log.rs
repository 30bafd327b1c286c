//! One line per event: to the kernel log when this is PID 1, to standard error otherwise.
//!
//! Writing never fails from a caller's view: there is nobody to tell.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::OnceLock;

static KERNEL_LOG: OnceLock<File> = OnceLock::new();

/// How much a line matters; the kernel's own levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Level {
    /// A requested action failed.
    Error = 3,
    /// Abnormal but harmless.
    Warning = 4,
    /// A rare change of state.
    Info = 6,
}

/// From now on write to the kernel log, which the console shows. Needs `/dev`.
pub fn use_kernel_log() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = KERNEL_LOG.set(file);
    }
}

/// Write one line.
pub fn line(level: Level, message: impl Display) {
    // One write per line: a record of /dev/kmsg is what one write holds.
    let _ = match KERNEL_LOG.get() {
        Some(file) => {
            let record = format!("<{}>torpor-guest: {message}\n", level as u8);
            (&*file).write_all(record.as_bytes())
        }
        None => std::io::stderr().write_all(format!("torpor-guest: {message}\n").as_bytes()),
    };
}

/// An error with its causes, outermost first, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
