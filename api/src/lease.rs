//! Leases: when a machine stops being awake by itself, and what happens then.

use serde::{Deserialize, Serialize};

/// What happens when a lease runs out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum LeaseAction {
    /// The machine sleeps with its memory.
    Pause,
    /// The machine, its disk and its aliases are deleted.
    Destroy,
}

/// What moves the deadline of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum LeaseMode {
    /// Only the API moves the deadline, and a wake starts the window anew.
    #[default]
    Absolute,
    /// Activity moves the deadline too.
    Sliding,
}

/// The part of a lease that the user sets. It belongs to the machine and survives every resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct LeasePolicy {
    /// Length of the window in seconds, counted only while the machine is awake.
    pub seconds: u64,
    /// What happens at the deadline.
    pub action: LeaseAction,
    /// What moves the deadline.
    #[serde(default)]
    pub mode: LeaseMode,
}

/// A lease as it stands; every reply that changes or shows one carries it whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The policy in force.
    #[serde(flatten)]
    pub policy: LeasePolicy,
    /// Unix time of the deadline in milliseconds; absent while the machine is asleep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_unix_ms: Option<u64>,
    /// Milliseconds to the deadline; absent while the machine is asleep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining_ms: Option<u64>,
}
