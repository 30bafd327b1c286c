//! `/v1/machines/{id}/files`: contents as raw bodies of any size, everything else as JSON. All of it wakes.

use super::answer::{Contents, NoContent};
use super::error::Failure;
use super::extract::{Json as Body, Named, Query};
use super::processes::inside;
use crate::inside::files::WriteOptions;
use crate::machine::fleet::Fleet;
use axum::Json;
use axum::body;
use axum::extract::State;
use futures_util::TryStreamExt;
use serde::Deserialize;
use torpor_api::guest::FileEntry;
use torpor_api::http::{FileList, FilePath, ListFiles, RemoveFile, RenameFile, SetAttributes};
use utoipa::IntoParams;

const DEFAULT_LIMIT: u64 = 1000;
const MAX_LIMIT: u64 = 10_000;
const MAX_DEPTH: u32 = 64;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Download {
    path: String,
    #[serde(default)]
    offset: u64,
    len: Option<u64>,
    user: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Upload {
    path: String,
    /// Octal, as in `0644`.
    mode: Option<String>,
    #[serde(default)]
    append: bool,
    user: Option<String>,
}

pub(super) async fn download(
    State(fleet): State<Fleet>,
    id: Named,
    Query(asked): Query<Download>,
) -> Result<Contents, Failure> {
    let window = (asked.offset, asked.len);
    let download = inside(&fleet, id)
        .download(&asked.path, window, asked.user)
        .await?;
    // A transfer that fails in its middle ends the connection before the body's last chunk.
    let contents = body::Body::from_stream(download.into_stream().map_err(std::io::Error::other));
    Ok(Contents(contents))
}

pub(super) async fn upload(
    State(fleet): State<Fleet>,
    id: Named,
    Query(asked): Query<Upload>,
    contents: body::Body,
) -> Result<Json<FileEntry>, Failure> {
    let mode = asked.mode.map(|mode| u32::from_str_radix(&mode, 8)).transpose();
    let mode = mode.map_err(|_| Failure::invalid("mode is no octal number"))?;
    let options = WriteOptions {
        mode,
        append: asked.append,
        user: asked.user,
        ..WriteOptions::default()
    };
    let inside = inside(&fleet, id);
    inside
        .upload_stream(&asked.path, options, contents.into_data_stream())
        .await?;
    Ok(Json(inside.stat(&asked.path, true, None).await?))
}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    id: Named,
    Body(asked): Body<ListFiles>,
) -> Result<Json<FileList>, Failure> {
    let (depth, limit) = (asked.depth.unwrap_or(1), asked.limit.unwrap_or(DEFAULT_LIMIT));
    if !(1..=MAX_DEPTH).contains(&depth) {
        return Err(Failure::invalid(format!(
            "depth is {depth}, and has to be 1 to {MAX_DEPTH}"
        )));
    }
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(Failure::invalid(format!(
            "limit is {limit}, and has to be 1 to {MAX_LIMIT}"
        )));
    }
    let page = inside(&fleet, id)
        .list(&asked.path, depth, (asked.skip, limit), asked.user)
        .await?;
    Ok(Json(FileList {
        entries: page.entries,
        more: page.more,
    }))
}

pub(super) async fn stat(
    State(fleet): State<Fleet>,
    id: Named,
    Body(asked): Body<FilePath>,
) -> Result<Json<FileEntry>, Failure> {
    Ok(Json(
        inside(&fleet, id).stat(&asked.path, false, asked.user).await?,
    ))
}

pub(super) async fn make_dir(
    State(fleet): State<Fleet>,
    id: Named,
    Body(asked): Body<FilePath>,
) -> Result<NoContent, Failure> {
    inside(&fleet, id).make_dir(&asked.path, asked.user).await?;
    Ok(NoContent)
}

pub(super) async fn remove(
    State(fleet): State<Fleet>,
    id: Named,
    Body(asked): Body<RemoveFile>,
) -> Result<NoContent, Failure> {
    inside(&fleet, id)
        .remove(&asked.path, asked.recursive, asked.user)
        .await?;
    Ok(NoContent)
}

pub(super) async fn rename(
    State(fleet): State<Fleet>,
    id: Named,
    Body(asked): Body<RenameFile>,
) -> Result<NoContent, Failure> {
    inside(&fleet, id)
        .rename(&asked.from, &asked.to, asked.user)
        .await?;
    Ok(NoContent)
}

pub(super) async fn set_attributes(
    State(fleet): State<Fleet>,
    id: Named,
    Body(asked): Body<SetAttributes>,
) -> Result<NoContent, Failure> {
    inside(&fleet, id)
        .set_attributes(&asked.path, asked.attributes, asked.user)
        .await?;
    Ok(NoContent)
}
