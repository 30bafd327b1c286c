//! `/v1/machines/{id}/exec`: a command in the guest; wakes it if its policy says so.

use super::error::Failure;
use super::extract::{Json as Body, Named};
use super::validate;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::extract::State;
use torpor_api::http::{ExecRequest, ExecResult};

pub(super) async fn run(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(request): Body<ExecRequest>,
) -> Result<Json<ExecResult>, Failure> {
    validate::exec(&request)?;
    Ok(Json(fleet.exec(&id, request).await?))
}
