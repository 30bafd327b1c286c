//! Machines: their lifecycle as a pure table, and the tasks that make it happen.
//!
//! * [`state`] – states, events, the transition table, recovery rules; no I/O.
//! * [`fleet`] – the operations on machines; [`driver`] – the task of one machine; [`registry`] – who has one.
//! * [`recovery`] – what a starting torpord finds; [`leases`], [`retention`] – the timers.
//! * [`gate`] – the way into a running machine; [`lines`] – connections that outlast pauses;
//!   [`routes`] – which port leads to which machine.
//! * [`hypervisor`] – what the lifecycle asks of the platform; [`simulated`] is a platform without VMMs.
//! * [`admission`] – memory of the host, first come, first served; [`room`] – who sleeps so that others can run.
//! * [`pre_copy`] – memory that is written ahead of a lease's end.
//! * [`telemetry`] – counters and histograms of all wakes and pauses.
//! * [`usage`] – what shows use that nobody tells of.
//! * [`clock`] – time, injected; [`dawn`] – who waits for a machine to run; [`error`] – the one error of operations.

pub mod admission;
pub mod clock;
pub mod dawn;
pub mod driver;
pub mod error;
pub mod fleet;
pub mod gate;
pub mod hypervisor;
pub mod leases;
pub mod lines;
pub mod pre_copy;
pub mod recovery;
pub mod registry;
pub mod retention;
pub mod room;
pub mod routes;
pub mod simulated;
pub mod state;
pub mod telemetry;
pub mod usage;

#[cfg(test)]
pub(crate) mod tests;
