//! `POST /v1/machines/{id}/ssh-access`: a certificate for the gateway, which finds the machine in it.

use super::super::answer::Created;
use super::super::error::Failure;
use super::super::extract::{Json as Body, Named};
use super::time::iso;
use crate::machine::fleet::Fleet;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use torpor_api::http::SshAccessRequest;
use utoipa::ToSchema;

const DEFAULT_MINUTES: u32 = 15;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Request {
    public_key: String,
    expires_in_minutes: Option<u32>,
    user: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Access {
    access_id: String,
    certificate: String,
    host: String,
    port: u16,
    user: String,
    expires_at: String,
    command: String,
    host_key: String,
}

pub(super) async fn grant(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<Request>,
) -> Result<Created<Access>, Failure> {
    let request = SshAccessRequest {
        public_key: body.public_key,
        expires_in_minutes: body.expires_in_minutes.unwrap_or(DEFAULT_MINUTES),
        user: body.user.unwrap_or_else(|| "root".to_owned()),
    };
    let access = fleet.grant_ssh_access(&id, request).await?;
    let access = Access {
        access_id: access.access_id.to_string(),
        certificate: access.certificate,
        host: access.host,
        port: access.port,
        user: access.user,
        expires_at: iso(access.expires_unix_ms),
        command: access.command,
        host_key: access.host_key,
    };
    Ok(Created(access))
}
