//! Files of a machine: read, written, listed, renamed, removed. All of it is traffic of the API, which wakes.
//!
//! Relative paths are below the machine's own directory. Contents that come raw are streamed; what is in JSON is
//! bounded like every body.

use super::super::answer::{Contents, NoContent};
use super::super::error::Failure;
use super::super::extract::{Json as Body, LargeJson, MOST_DISCARDED, Named, Query};
use super::time::iso;
use crate::inside::Inside;
use crate::inside::files::WriteOptions;
use crate::machine::fleet::{Fleet, WakeSource};
use axum::Json;
use axum::extract::{Request, State};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use torpor_api::guest::{FileEntry, FileType};
use torpor_api::{ErrorCode, MachineId};
use utoipa::{IntoParams, ToSchema};

/// Directory of relative paths on a machine that has none of its own.
const DEFAULT_DIRECTORY: &str = "/workspace";
/// Most entries of one listing.
const MOST_ENTRIES: u64 = 10_000;
/// Largest file that is answered in JSON: as large as one that came in JSON can be.
const MOST_READ_BYTES: u64 = MOST_DISCARDED as u64;

#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Encoding {
    #[default]
    #[serde(alias = "utf-8")]
    Utf8,
    Base64,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct At {
    path: String,
    #[serde(default)]
    user: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Read {
    path: String,
    #[serde(default)]
    encoding: Option<Encoding>,
    #[serde(default)]
    user: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Write {
    path: String,
    content: String,
    #[serde(default)]
    encoding: Option<Encoding>,
    #[serde(default)]
    user: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rename {
    old_path: String,
    new_path: String,
    #[serde(default)]
    user: Option<String>,
}

#[derive(Deserialize, IntoParams)]
pub(super) struct Listed {
    #[serde(default = "default_directory")]
    path: String,
    depth: Option<u32>,
    user: Option<String>,
}

/// A path where there is no body.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct InQuery {
    path: String,
    user: Option<String>,
}

/// What is in a file.
#[derive(Serialize, ToSchema)]
pub(super) struct Content {
    content: String,
    encoding: Encoding,
    /// Bytes.
    size: usize,
}

#[derive(Serialize, ToSchema)]
pub(super) struct Exists {
    exists: bool,
}

fn default_directory() -> String {
    DEFAULT_DIRECTORY.to_owned()
}

/// Nothing that the SDK does not know may be in it.
#[derive(Serialize, ToSchema)]
pub(super) struct FileInfo {
    name: String,
    path: String,
    is_dir: bool,
    size: u64,
    #[serde(rename = "type")]
    kind: &'static str,
    mode: String,
    permissions: String,
    owner: String,
    group: String,
    modified_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    symlink_target: Option<String>,
}

fn permissions(mode: u32) -> String {
    let bit = |shift: u32, letter: char| if mode >> shift & 1 == 1 { letter } else { '-' };
    (0..9)
        .rev()
        .map(|shift| bit(shift, ['x', 'w', 'r'][(shift % 3) as usize]))
        .collect()
}

impl From<FileEntry> for FileInfo {
    fn from(entry: FileEntry) -> Self {
        let modified_unix_ms = u64::try_from(entry.modified_unix_ms).unwrap_or(0);
        Self {
            is_dir: entry.file_type == FileType::Directory,
            kind: match entry.file_type {
                FileType::File => "file",
                FileType::Directory => "dir",
                FileType::Symlink => "symlink",
                FileType::Other => "other",
            },
            size: entry.size,
            mode: format!("{:04o}", entry.mode & 0o7777),
            permissions: permissions(entry.mode),
            owner: entry.owner.unwrap_or_else(|| entry.uid.to_string()),
            group: entry.group.unwrap_or_else(|| entry.gid.to_string()),
            modified_time: iso(modified_unix_ms),
            symlink_target: entry.symlink_target,
            name: entry.name,
            path: entry.path,
        }
    }
}

/// The inside of a machine, and the absolute path that a caller means.
pub(super) async fn at(fleet: &Fleet, id: MachineId, path: &str) -> Result<(Inside, String), Failure> {
    if path.is_empty() || path.contains('\0') {
        return Err(Failure::invalid("path is empty or has a NUL character"));
    }
    let absolute = if path.starts_with('/') {
        path.to_owned()
    } else {
        let directory = fleet.view(&id).await?.cwd;
        let directory = directory.unwrap_or_else(default_directory);
        format!("{}/{path}", directory.trim_end_matches('/'))
    };
    Ok((fleet.inside(id, WakeSource::Api), absolute))
}

pub(super) async fn read(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<Read>,
) -> Result<Json<Content>, Failure> {
    let (inside, path) = at(&fleet, id, &body.path).await?;
    let mut download = inside.download(&path, (0, None), body.user).await?;
    let mut bytes = Vec::new();
    while let Some(chunk) = download.next().await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > MOST_READ_BYTES {
            let message =
                format!("{path} is larger than {MOST_READ_BYTES} bytes; read it as bytes or as a stream");
            return Err(Failure::new(ErrorCode::BodyTooLarge, message));
        }
    }
    let size = bytes.len();
    let encoding = body.encoding.unwrap_or_default();
    let content = match encoding {
        Encoding::Base64 => STANDARD.encode(&bytes),
        Encoding::Utf8 => String::from_utf8_lossy(&bytes).into_owned(),
    };
    Ok(Json(Content {
        content,
        encoding,
        size,
    }))
}

pub(super) async fn write(
    State(fleet): State<Fleet>,
    Named(id): Named,
    LargeJson(body): LargeJson<Write>,
) -> Result<Json<FileInfo>, Failure> {
    let bytes = match body.encoding.unwrap_or_default() {
        Encoding::Utf8 => body.content.into_bytes(),
        Encoding::Base64 => STANDARD
            .decode(body.content)
            .map_err(|error| Failure::invalid(format!("content is no base64: {error}")))?,
    };
    let (inside, path) = at(&fleet, id, &body.path).await?;
    let options = WriteOptions {
        user: body.user.clone(),
        ..WriteOptions::default()
    };
    let mut upload = inside.upload(&path, options).await?;
    upload.write(&bytes).await?;
    upload.finish().await?;
    Ok(Json(inside.stat(&path, true, body.user).await?.into()))
}

pub(super) async fn download(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(at_path): Query<InQuery>,
) -> Result<Contents, Failure> {
    let (inside, path) = at(&fleet, id, &at_path.path).await?;
    let download = inside.download(&path, (0, None), at_path.user).await?;
    Ok(Contents(axum::body::Body::from_stream(download.into_stream())))
}

pub(super) async fn upload(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(at_path): Query<InQuery>,
    request: Request,
) -> Result<Json<FileInfo>, Failure> {
    let (inside, path) = at(&fleet, id, &at_path.path).await?;
    let options = WriteOptions {
        user: at_path.user.clone(),
        ..WriteOptions::default()
    };
    let contents = request.into_body().into_data_stream();
    inside.upload_stream(&path, options, contents).await?;
    Ok(Json(inside.stat(&path, true, at_path.user).await?.into()))
}

pub(super) async fn list(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Query(listed): Query<Listed>,
) -> Result<Json<Vec<FileInfo>>, Failure> {
    let (inside, path) = at(&fleet, id, &listed.path).await?;
    let depth = listed.depth.unwrap_or(1).max(1);
    let page = inside.list(&path, depth, (0, MOST_ENTRIES), listed.user).await?;
    Ok(Json(page.entries.into_iter().map(FileInfo::from).collect()))
}

pub(super) async fn exists(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<At>,
) -> Result<Json<Exists>, Failure> {
    let (inside, path) = at(&fleet, id, &body.path).await?;
    let exists = inside.exists(&path, body.user).await?;
    Ok(Json(Exists { exists }))
}

pub(super) async fn info(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<At>,
) -> Result<Json<FileInfo>, Failure> {
    let (inside, path) = at(&fleet, id, &body.path).await?;
    Ok(Json(inside.stat(&path, false, body.user).await?.into()))
}

pub(super) async fn make_dir(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<At>,
) -> Result<Json<FileInfo>, Failure> {
    let (inside, path) = at(&fleet, id, &body.path).await?;
    inside.make_dir(&path, body.user.clone()).await?;
    Ok(Json(inside.stat(&path, true, body.user).await?.into()))
}

pub(super) async fn remove(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<At>,
) -> Result<NoContent, Failure> {
    let (inside, path) = at(&fleet, id, &body.path).await?;
    inside.remove(&path, true, body.user).await?;
    Ok(NoContent)
}

pub(super) async fn rename(
    State(fleet): State<Fleet>,
    Named(id): Named,
    Body(body): Body<Rename>,
) -> Result<Json<FileInfo>, Failure> {
    let (inside, from) = at(&fleet, id.clone(), &body.old_path).await?;
    let (_, to) = at(&fleet, id, &body.new_path).await?;
    inside.rename(&from, &to, body.user.clone()).await?;
    Ok(Json(inside.stat(&to, false, body.user).await?.into()))
}
