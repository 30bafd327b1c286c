//! Threads of the agent: small stacks, all signals blocked, a panic ends nothing but the thread.

use std::io;

/// Enough for the deepest JSON that serde_json accepts and for a buffer of 64 KiB.
const STACK_BYTES: usize = 256 << 10;

/// Start a thread that nobody joins.
pub fn start(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(body)
        .map(drop)
}
