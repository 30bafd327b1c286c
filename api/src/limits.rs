//! Bounds on everything that comes from outside.

/// Fewest and most vCPUs of a machine.
pub const VCPUS: std::ops::RangeInclusive<u8> = 1..=8;
/// Least and most guest memory, in MiB.
pub const MEM_MIB: std::ops::RangeInclusive<u32> = 128..=65_536;
/// Least and most size of a machine's disk, in MiB.
pub const DISK_MIB: std::ops::RangeInclusive<u32> = 512..=1_048_576;
/// Shortest and longest lease, in seconds (a year and a day).
pub const LEASE_SECONDS: std::ops::RangeInclusive<u64> = 1..=31_622_400;
/// Most services one machine exposes.
pub const MAX_SERVICES: usize = 64;
/// Most key/value pairs of metadata, and the most bytes of one key and one value.
pub const MAX_METADATA: (usize, usize, usize) = (64, 128, 4096);
/// Largest JSON body that the API reads, in bytes.
pub const MAX_JSON_BODY: usize = 1 << 20;
/// Longest command, argument list and environment of one exec together, in bytes.
pub const MAX_EXEC_BYTES: usize = 256 << 10;
/// Most output of a run-to-completion exec that is kept per stream, in bytes.
pub const MAX_EXEC_OUTPUT: usize = 8 << 20;
/// Shortest and longest validity of an edge token, in seconds.
pub const EDGE_TOKEN_SECONDS: std::ops::RangeInclusive<u64> = 60..=86_400;
/// Validity of an edge token if none is asked for, in seconds.
pub const DEFAULT_EDGE_TOKEN_SECONDS: u64 = 3_600;
/// Most grants of one machine that are neither revoked nor expired.
pub const MAX_ACTIVE_GRANTS: u32 = 10_000;
/// Shortest and longest wait of a request for a wake, in milliseconds.
pub const WAKE_DEADLINE_MS: std::ops::RangeInclusive<u64> = 100..=600_000;
/// Shortest and longest retention of what nobody uses, in seconds (ten years).
pub const RETENTION_SECONDS: std::ops::RangeInclusive<u64> = 1..=315_360_000;
/// Least and most floor of busy processors, in percent of one.
pub const CPU_FLOOR_PERCENT: std::ops::RangeInclusive<u16> = 1..=800;
/// Longest minimum time awake, in seconds (a day).
pub const MAX_MIN_AWAKE_SECONDS: u64 = 86_400;
/// Longest digest of a snapshot in bytes.
pub const MAX_DIGEST: usize = 256;
/// Fewest and most machines of one fork.
pub const FORKS: std::ops::RangeInclusive<u32> = 1..=64;
