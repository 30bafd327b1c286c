//! What a host keeps ready.

use serde::{Deserialize, Serialize};

/// What is kept ready for the next start or wake. An empty pool makes it slower, and is no error.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Pools {
    /// VMMs that have built all of a VM but its memory, for the shapes used last, the last one first.
    pub blank_vmms: Vec<BlankVmms>,
    /// Network slots: namespace, tap and veth.
    pub slots: Slots,
    /// Machines that sleep and keep their VMM.
    pub sleepers: SleeperCounts,
}

/// Blank VMMs of one shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct BlankVmms {
    /// Processors.
    pub vcpus: u8,
    /// Memory in MiB.
    pub mem_mib: u32,
    /// Ready now.
    pub ready: u64,
    /// Kept when nothing is being started (`limits.blank_vmms`).
    pub wanted: u64,
}

/// Network slots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Slots {
    /// Ready now.
    pub ready: u64,
    /// Kept when nothing is being started.
    pub wanted: u64,
    /// Kept for sleeping machines to which clients have connections open.
    pub parked: u64,
    /// Neither made nor lent out.
    pub free: u64,
    /// All together (`limits.max_running`).
    pub most: u64,
}

/// Machines that sleep and keep their VMM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SleeperCounts {
    /// With their memory.
    pub resident: u64,
    /// Guest memory of those in MiB (at most `limits.resident_mem_mib`).
    pub resident_mem_mib: u64,
    /// Without it (at most `limits.dozing`).
    pub dozing: u64,
}
