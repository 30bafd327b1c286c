//! `GET /v1/endpoints`: where this host is reached, in which words.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Addresses that clients on this host use, and where the token for them is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Endpoints {
    /// The native API, for example `http://127.0.0.1:7070`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub native: Option<String>,
    /// The API of the `morphcloud` SDK.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub morph: Option<String>,
    /// The API of the `nullspace-sdk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nullspace: Option<String>,
    /// The SSH gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh: Option<SshEndpoint>,
    /// File with the bearer token of all of them.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub token_file: PathBuf,
}

/// Where the SSH gateway listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SshEndpoint {
    /// Address or host name.
    pub host: String,
    /// TCP port.
    pub port: u16,
}
