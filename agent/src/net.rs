//! Network slots: one network namespace per running machine, made ahead of need and never shared.
//!
//! ```text
//!  guest 172.31.0.2 -- tap0 172.31.0.1 [ netns torpor-<n>: masquerade ] eth0 10.200.x.y+2 -- tpr<n> 10.200.x.y+1 host
//! ```
//! Every guest has the same address and MAC, so images and forks need no renumbering; the namespace keeps them
//! apart. Links, addresses and routes are made over rtnetlink on a thread of its own per slot (a thread that has
//! entered a namespace never returns to a pool); packet rules by one `nft` process per slot at its creation. A
//! wake takes a finished slot from [`pool`] and starts no process. A slot is scrubbed by being deleted: its
//! connection tracking, neighbours and sockets end with its namespace.
//!
//! What a guest may reach: everything that the host can forward to, except the host's own addresses, link-local
//! addresses (cloud metadata) and other slots ([`rules`]). DNS queries to 172.31.0.1 go to the host's resolver
//! ([`dns`]). There is no IPv6 in a slot. A host whose own firewall drops forwarded packets by default must let
//! `tpr*` through: an `accept` in our table can't undo a `drop` in another.
//!
//! Not its job: listening for clients, which is the proxy's, and moving packets, which is the VMM's.

mod connect;
pub mod dns;
mod links;
mod namespace;
pub mod pool;
pub mod rules;
mod slot;
mod sys;

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

pub use pool::{RefillHold, SlotLease, SlotPool};

/// First address of the links between slots and host; a slot has the /30 of its number.
const UPLINK_BASE: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 0);
/// Prefix length of all uplinks together.
const UPLINK_PREFIX_LEN: u8 = 16;
/// Prefix length of one uplink.
const SLOT_PREFIX_LEN: u8 = 30;
/// Most slots on a host.
pub const MAX_SLOTS: u16 = 4096;
/// Name of the tap inside a slot.
const TAP: &str = "tap0";
/// Name of the uplink inside a slot.
const UPLINK: &str = "eth0";

/// Where slots are made, and how many.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Directory of named network namespaces.
    pub netns_dir: PathBuf,
    /// Most slots at a time, at most [`MAX_SLOTS`].
    pub max_slots: u16,
    /// Slots that are kept ready.
    pub spares: usize,
    /// The resolver that guests' queries go to.
    pub nameserver: Ipv4Addr,
}

impl NetConfig {
    /// The host's own places, with the resolver that its `/etc/resolv.conf` names.
    #[must_use]
    pub fn for_host(max_slots: u16) -> Self {
        Self {
            netns_dir: PathBuf::from("/run/netns"),
            max_slots: max_slots.min(MAX_SLOTS),
            spares: 2,
            nameserver: dns::host_nameserver(),
        }
    }

    fn netns_path(&self, number: u16) -> PathBuf {
        self.netns_dir.join(format!("torpor-{number}"))
    }
}

/// Why a slot could not be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Every slot is taken.
    #[error("all {max_slots} network slots are in use")]
    Exhausted {
        /// How many there are.
        max_slots: u16,
    },
    /// The operating system refused.
    #[error("slot {number}: cannot {operation}")]
    Os {
        /// Which slot.
        number: u16,
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// rtnetlink refused.
    #[error("slot {number}: cannot {operation}")]
    Netlink {
        /// Which slot.
        number: u16,
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// The host could not be set up.
    #[error("cannot {operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `nft` took no rules.
    #[error("nft refused the rules of {scope}: {stderr}")]
    Rules {
        /// Whose rules.
        scope: String,
        /// What it said.
        stderr: String,
    },
    /// The thread that did the work is gone.
    #[error("slot {number}: the thread that worked on it ended early")]
    Lost {
        /// Which slot.
        number: u16,
    },
}

/// Bytes that were written to a TCP socket and not acknowledged by the other side yet.
///
/// # Errors
/// It is no TCP socket.
pub fn unacknowledged_bytes(socket: std::os::fd::BorrowedFd<'_>) -> io::Result<usize> {
    sys::unacknowledged_bytes(socket)
}

/// Addresses of the uplink of a slot: the host's end and the slot's end.
fn uplink_addresses(number: u16) -> (Ipv4Addr, Ipv4Addr) {
    let base = u32::from(UPLINK_BASE) + u32::from(number) * 4;
    (Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2))
}

/// Name of the host's end of a slot's uplink.
fn uplink_name(number: u16) -> String {
    format!("{}{number}", rules::UPLINK_NAME_PREFIX)
}

#[cfg(test)]
mod tests;
