//! The command as a shell sees it: exit codes, standard streams, and what it asks torpord for.

#![expect(clippy::unwrap_used, reason = "a test helper that fails fails its test")]

mod commands;
mod ssh;
mod support;
