//! Who may reach a service: auth modes, signed URLs and the grants behind them.

use crate::ids::{GrantId, MachineId};
use serde::{Deserialize, Serialize};

/// What an HTTP request to a service must show before it is forwarded, or wakes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ServiceAuth {
    /// Nothing.
    #[default]
    None,
    /// `Authorization: Bearer` with the token of the API.
    ApiKey,
    /// An edge token: in the query, a header, or the cookie that a first hit sets.
    Token,
}

/// What an edge token is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum GrantTransport {
    /// Requests and upgrades.
    #[default]
    Any,
    /// Requests that do not upgrade.
    Http,
    /// Upgrades only.
    Websocket,
}

/// Where a grant stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum GrantStatus {
    /// Its token is taken.
    Active,
    /// Its time is over.
    Expired,
    /// It was taken back.
    Revoked,
}

/// `POST /v1/machines/{id}/services/{port}/grants`; the body may be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CreateGrant {
    /// Validity in seconds, 60 to 86,400; an hour if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_in_seconds: Option<u64>,
    /// What it is good for.
    pub transport: GrantTransport,
}

/// Leave to use one service, and what came of it. The token itself is shown once, when it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Grant {
    /// What a revocation names.
    pub id: GrantId,
    /// The machine.
    pub machine_id: MachineId,
    /// Port in the guest.
    pub port: u16,
    /// What it is good for.
    pub transport: GrantTransport,
    /// Where it stands.
    pub status: GrantStatus,
    /// Unix time of its making in milliseconds.
    pub issued_unix_ms: u64,
    /// Unix time of its end in milliseconds.
    pub expires_unix_ms: u64,
    /// When it was taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_unix_ms: Option<u64>,
    /// When its token was first taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_used_unix_ms: Option<u64>,
    /// When its token was last taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_unix_ms: Option<u64>,
    /// Requests and upgrades together.
    pub use_count: u64,
    /// Requests that did not upgrade.
    pub http_request_count: u64,
    /// Upgrades.
    pub websocket_connection_count: u64,
    /// Payload bytes towards the guest.
    pub bytes_in_count: u64,
    /// Payload bytes from the guest.
    pub bytes_out_count: u64,
}

/// Answer to the making of a grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct IssuedGrant {
    /// The grant.
    pub grant: Grant,
    /// The token, for the query key `edge_token` or the header `x-edge-token`.
    pub token: String,
    /// The service's URL with the token; absent for a grant of WebSockets only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Likewise for WebSockets; absent for a grant of plain requests only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub websocket_url: Option<String>,
}

/// `GET /v1/machines/{id}/services/{port}/grants`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct GrantList {
    /// Newest first, at most a thousand.
    pub grants: Vec<Grant>,
}

/// `PATCH /v1/machines/{id}/services/{port}`: only what is given changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct PatchService {
    /// What a request must show.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<ServiceAuth>,
    /// Longest wait of a request for a wake in milliseconds; 0 for the host's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wake_deadline_ms: Option<u64>,
}

/// `POST /v1/edge-keys/rotate`; the body may be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct RotateEdgeKey {
    /// Tokens of earlier keys are refused from now on, instead of until they expire.
    pub revoke_earlier: bool,
}

/// A key that signs, or still vouches for, edge tokens. The secret never leaves the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct EdgeKey {
    /// As it stands in tokens.
    pub id: String,
    /// Unix time of its making in milliseconds.
    pub created_unix_ms: u64,
    /// Whether new tokens are signed with it.
    pub signs: bool,
}

/// `GET /v1/edge-keys`, and the answer to a rotation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct EdgeKeyList {
    /// Newest first.
    pub keys: Vec<EdgeKey>,
}
