//! What counts as use of a machine, for sliding leases.

use serde::{Deserialize, Serialize};

/// Where use shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ActivitySource {
    /// Requests and payload bytes through the proxy; open connections, pings and keep-alives are none.
    Proxy,
    /// Calls of the API that need the guest, commands that somebody waits for, and payload of SSH sessions.
    Sessions,
    /// Bytes between the guest and the world outside, both ways, above what keeps a connection alive.
    Outbound,
    /// The guest's processors were busy for more than the floor.
    Cpu,
}

impl ActivitySource {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Proxy, Self::Sessions, Self::Outbound, Self::Cpu];
}

/// What keeps a machine with a sliding lease awake. It belongs to the machine and survives every resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ActivityPolicy {
    /// Requests and payload through the proxy.
    pub proxy: bool,
    /// API calls, commands and SSH sessions.
    pub sessions: bool,
    /// What the guest itself exchanges with the world outside.
    pub outbound: bool,
    /// Busy processors.
    pub cpu: bool,
    /// The hold that code inside takes (`torpor-guest hold 10m`).
    pub hold: bool,
    /// Share of one processor above which the guest counts as busy, in percent.
    pub cpu_floor_percent: u16,
    /// No lease ends sooner than so many seconds after a start or a wake.
    pub min_awake_seconds: u64,
}

impl Default for ActivityPolicy {
    fn default() -> Self {
        Self {
            proxy: true,
            sessions: true,
            outbound: true,
            cpu: true,
            hold: true,
            cpu_floor_percent: 25,
            min_awake_seconds: 0,
        }
    }
}

impl ActivityPolicy {
    /// Whether this source counts.
    #[must_use]
    pub fn counts(&self, source: ActivitySource) -> bool {
        match source {
            ActivitySource::Proxy => self.proxy,
            ActivitySource::Sessions => self.sessions,
            ActivitySource::Outbound => self.outbound,
            ActivitySource::Cpu => self.cpu,
        }
    }
}

/// `PATCH /v1/machines/{id}/activity`: only what is given changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct PatchActivity {
    /// Requests and payload through the proxy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<bool>,
    /// API calls, commands and SSH sessions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions: Option<bool>,
    /// What the guest itself exchanges with the world outside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outbound: Option<bool>,
    /// Busy processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<bool>,
    /// Holds taken inside.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold: Option<bool>,
    /// In percent of one processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_floor_percent: Option<u16>,
    /// In seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_awake_seconds: Option<u64>,
}

impl PatchActivity {
    /// The policy with this change.
    #[must_use]
    pub fn of(&self, policy: ActivityPolicy) -> ActivityPolicy {
        ActivityPolicy {
            proxy: self.proxy.unwrap_or(policy.proxy),
            sessions: self.sessions.unwrap_or(policy.sessions),
            outbound: self.outbound.unwrap_or(policy.outbound),
            cpu: self.cpu.unwrap_or(policy.cpu),
            hold: self.hold.unwrap_or(policy.hold),
            cpu_floor_percent: self.cpu_floor_percent.unwrap_or(policy.cpu_floor_percent),
            min_awake_seconds: self.min_awake_seconds.unwrap_or(policy.min_awake_seconds),
        }
    }
}

/// When a source was last seen, in `GET /v1/machines/{id}/why`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ActivitySign {
    /// Which.
    pub source: ActivitySource,
    /// Whether the machine's policy lets it count.
    pub counts: bool,
    /// Milliseconds since then.
    pub ago_ms: u64,
}
