//! The agent as the host sees it: the real binary, driven over a unix socket.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests; clippy.toml only sees #[test] functions"
)]

#[path = "agent/attach.rs"]
mod attach;
#[path = "agent/client.rs"]
mod client;
#[path = "agent/exec.rs"]
mod exec;
#[path = "agent/files.rs"]
mod files;
#[path = "agent/forward.rs"]
mod forward;
#[path = "agent/hostile.rs"]
mod hostile;
#[path = "agent/machine.rs"]
mod machine;
#[path = "agent/terminal.rs"]
mod terminal;
