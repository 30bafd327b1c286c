//! Machines: their lifecycle as a pure table, and the tasks that make it happen.
//!
//! * [`state`] – states, events, the transition table, recovery rules; no I/O.
//! * [`hypervisor`] – what the lifecycle asks of the platform; `simulated` is a platform without VMMs.
//! * [`clock`] – time, injected.
//! * [`gate`] – the way into a running machine.

pub mod clock;
pub mod gate;
pub mod hypervisor;
pub mod state;
