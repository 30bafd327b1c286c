//! The proxy over real sockets: test wakers, scripted guests, hostile clients.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test helper that fails fails its test"
)]

mod contract;
mod hostile;
mod http;
mod lifecycle;
mod secure;
mod support;
mod tcp;
mod timeouts;
mod upgrade;
