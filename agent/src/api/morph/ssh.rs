//! SSH keys of instances and of the user. What opens which instance is the gateway's.

use super::super::answer::{Created, NoContent};
use super::super::error::Failure;
use super::super::extract::{Json as Body, Named, OptionalJson, Path};
use super::super::machines::to_the_end;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use torpor_api::ErrorCode;
use torpor_api::http::{MachineSshKey, NewSshKey, SshKey};
use utoipa::ToSchema;

#[derive(Deserialize, Default, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

#[derive(Serialize, ToSchema)]
pub(super) struct InstanceKey {
    object: &'static str,
    private_key: String,
    public_key: String,
    password: String,
}

impl From<MachineSshKey> for InstanceKey {
    fn from(key: MachineSshKey) -> Self {
        Self {
            object: "instance_ssh_key",
            private_key: key.private_key,
            public_key: key.public_key,
            password: key.password,
        }
    }
}

pub(super) async fn show(State(fleet): State<Fleet>, Named(id): Named) -> Result<Json<InstanceKey>, Failure> {
    Ok(Json(fleet.machine_ssh_key(&id).await?.into()))
}

pub(super) async fn rotate(
    State(fleet): State<Fleet>,
    Named(id): Named,
    OptionalJson(Nothing {}): OptionalJson<Nothing>,
) -> Result<Json<InstanceKey>, Failure> {
    let key = to_the_end(async move { Ok(fleet.rotate_machine_ssh_key(&id).await?) }).await?;
    Ok(Json(key.into()))
}

#[derive(Serialize, ToSchema)]
pub(super) struct UserKey {
    object: &'static str,
    id: String,
    name: String,
    public_key: String,
    fingerprint: String,
    algorithm: String,
    /// Unix time in seconds.
    created: u64,
    updated: u64,
    status: &'static str,
    expires: Option<u64>,
}

impl From<SshKey> for UserKey {
    fn from(key: SshKey) -> Self {
        let algorithm = key.public_key.split(' ').next().unwrap_or_default();
        Self {
            object: "user_ssh_key",
            algorithm: algorithm.to_owned(),
            updated: key.created_unix_ms / 1000,
            status: "active",
            id: key.id.to_string(),
            name: key.name,
            public_key: key.public_key,
            fingerprint: key.fingerprint,
            created: key.created_unix_ms / 1000,
            expires: None,
        }
    }
}

#[derive(Serialize, ToSchema)]
pub(super) struct UserKeys {
    object: &'static str,
    data: Vec<UserKey>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewKey {
    name: Option<String>,
    public_key: String,
    expires: Option<u64>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PatchKey {
    name: Option<String>,
    #[serde(default)]
    expires: Option<u64>,
}

fn no_expiry(expires: Option<u64>) -> Result<(), Failure> {
    match expires {
        None => Ok(()),
        Some(_) => Err(Failure::new(
            ErrorCode::NotImplemented,
            "keys that expire are not implemented",
        )),
    }
}

pub(super) async fn user_keys(State(fleet): State<Fleet>) -> Result<Json<UserKeys>, Failure> {
    let keys = fleet.ssh_keys().await?.ssh_keys.into_iter();
    Ok(Json(UserKeys {
        object: "list",
        data: keys.map(UserKey::from).collect(),
    }))
}

pub(super) async fn add_user_key(
    State(fleet): State<Fleet>,
    Body(new): Body<NewKey>,
) -> Result<Created<UserKey>, Failure> {
    no_expiry(new.expires)?;
    let key = NewSshKey {
        name: new.name,
        public_key: new.public_key,
    };
    Ok(Created(fleet.add_ssh_key(key).await?.into()))
}

pub(super) async fn user_key(
    State(fleet): State<Fleet>,
    Path(id): Path<String>,
) -> Result<Json<UserKey>, Failure> {
    Ok(Json(fleet.ssh_key(&id).await?.into()))
}

pub(super) async fn change_user_key(
    State(fleet): State<Fleet>,
    Path(id): Path<String>,
    Body(patch): Body<PatchKey>,
) -> Result<Json<UserKey>, Failure> {
    no_expiry(patch.expires)?;
    let key = match patch.name {
        Some(name) => fleet.rename_ssh_key(&id, name).await?,
        None => fleet.ssh_key(&id).await?,
    };
    Ok(Json(key.into()))
}

pub(super) async fn remove_user_key(
    State(fleet): State<Fleet>,
    Path(id): Path<String>,
) -> Result<NoContent, Failure> {
    fleet.remove_ssh_key(&id).await?;
    Ok(NoContent)
}
