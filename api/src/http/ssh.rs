//! SSH: keys of machines, registered keys, certificates.

use crate::ids::{AccessId, SshKeyId};
use serde::{Deserialize, Serialize};

/// `GET` and `POST /v1/machines/{id}/ssh-key`: what opens this machine and no other.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct MachineSshKey {
    /// In OpenSSH's format.
    pub private_key: String,
    /// `ssh-ed25519 AAAA… comment`.
    pub public_key: String,
    /// `SHA256:…`.
    pub fingerprint: String,
    /// Opens the machine, too.
    pub password: String,
}

impl std::fmt::Debug for MachineSshKey {
    /// Without what has to stay secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineSshKey")
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

/// `POST /v1/ssh-keys`: a key that opens every machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NewSshKey {
    /// For people; the key's comment if not given.
    #[serde(default)]
    pub name: Option<String>,
    /// A line as in an `authorized_keys` file, without options.
    pub public_key: String,
}

/// `PATCH /v1/ssh-keys/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PatchSshKey {
    /// For people.
    pub name: String,
}

/// A registered key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SshKey {
    /// Its ID.
    pub id: SshKeyId,
    /// For people.
    pub name: String,
    /// `ssh-ed25519 AAAA… comment`.
    pub public_key: String,
    /// `SHA256:…`.
    pub fingerprint: String,
    /// Unix time in milliseconds.
    pub created_unix_ms: u64,
}

/// `GET /v1/ssh-keys`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SshKeyList {
    /// Oldest first.
    pub ssh_keys: Vec<SshKey>,
}

/// `POST /v1/machines/{id}/ssh-access`: a certificate for this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SshAccessRequest {
    /// The key that is to be certified.
    pub public_key: String,
    /// Minutes until it expires, 1 to 60.
    #[serde(default = "default_minutes")]
    pub expires_in_minutes: u32,
    /// User in the guest, who is also the user name of the login.
    #[serde(default = "root")]
    pub user: String,
}

fn default_minutes() -> u32 {
    15
}

fn root() -> String {
    "root".to_owned()
}

/// A certificate, and how to use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SshAccess {
    /// Names the access.
    pub access_id: AccessId,
    /// Content of a `-cert.pub` file.
    pub certificate: String,
    /// Where the gateway is.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// User name of the login.
    pub user: String,
    /// Unix time in milliseconds.
    pub expires_unix_ms: u64,
    /// What to type, with the key and its certificate in place.
    pub command: String,
    /// The gateway's own key, as in a `known_hosts` file: type and base64.
    pub host_key: String,
}

/// `GET /v1/ssh`: where the gateway is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct SshGateway {
    /// Where clients on this host find it.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Its key, as in a `known_hosts` file: type and base64.
    pub host_key: String,
}
