//! What torpord, its VMM, its guest agent and its clients agree on.
//!
//! Pure types: identities, leases, [`activity`], error codes, the bodies of the HTTP API ([`http`]), the control
//! protocol between torpord and one VMM process ([`vmm`]) and the frame protocol spoken with the
//! agent inside the guest ([`guest`]). Nothing here does I/O; every other crate depends on this one.

pub mod activity;
pub mod error_code;
pub mod guest;
pub mod http;
pub mod ids;
pub mod lease;
pub mod limits;
#[cfg(feature = "schema")]
mod schema;
pub mod vmm;

pub use error_code::{ApiError, ErrorCode};
pub use ids::{AccessId, ExecutionId, GrantId, IdError, MachineId, MachineName, SnapshotId, SshKeyId};
pub use lease::{Lease, LeaseAction, LeaseMode, LeasePolicy};
