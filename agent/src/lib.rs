//! torpord: a host's machines, asleep and awake. A map of the crate:
//!
//! * [`machine`] – the lifecycle: the pure transition table, one driver task per machine that is not asleep,
//!   lease timers, recovery.
//! * [`store`] – all SQL.
//! * [`edge`] – who is let in: keys, tokens, revocations, counters of signed URLs.
//! * [`api`] – HTTP to machine, error to response.
//! * [`ssh`] – keys, certificates, and the SSH gateway's way to machines.
//! * [`inside`] – what is done inside a running guest: processes, terminals, files, figures.
//! * [`execution`], [`vmm_client`], [`guest_client`], [`net`], [`images`] – the platform: VMM processes, guest
//!   agents, network slots, files.
//! * [`sockets`] – listening sockets that outlive this process.

pub mod api;
pub mod config;
pub mod edge;
pub mod execution;
pub mod guest_client;
pub mod images;
pub mod inside;
pub mod machine;
pub mod net;
pub mod sockets;
pub mod ssh;
pub mod store;
pub mod vmm_client;
pub mod waker;
