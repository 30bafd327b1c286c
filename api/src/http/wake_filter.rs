//! What must not wake a machine, and what it is answered instead.

use serde::{Deserialize, Serialize};

/// One rule; everything that it names must match. The first rule that matches counts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct WakeRule {
    /// Beginning of the path; with a `*`, the whole path, where `*` stands for any text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// HTTP methods.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<String>,
    /// Part of the `User-Agent`, in any case; with a `*`, all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<String>,
    /// Networks of clients, such as `10.0.0.0/8`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
    /// Port in the guest; every service if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What is answered.
    pub answer: WakeAnswer,
}

/// The answer to a request that wakes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct WakeAnswer {
    /// HTTP status, 200 to 599.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: String,
    /// Body.
    pub body: String,
}

impl Default for WakeAnswer {
    fn default() -> Self {
        Self {
            status: 204,
            content_type: "text/plain; charset=utf-8".to_owned(),
            body: String::new(),
        }
    }
}

/// `GET` and `PUT /v1/machines/{id}/wake/filter`: which HTTP requests never wake the machine. It is looked at only
/// while the machine sleeps.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct WakeFilter {
    /// In order.
    pub rules: Vec<WakeRule>,
}
