//! `/v1/machines/{id}/uploads`: large files and directories, in parts that can be sent again and at once.
//!
//! Parts are written into one file beside the target as they come, so nothing is staged on this host; the last call
//! checks the whole, and renames or unpacks it. What is known of an upload lives in this process: after a restart
//! its client begins again.

mod model;

use super::super::answer::{Created, NoContent};
use super::super::error::Failure;
use super::super::extract::{Json as Body, Named, OptionalJson, Path};
use super::super::machines::idempotency;
use super::files::at;
use super::time::iso;
use crate::inside::Inside;
use crate::inside::files::WriteOptions;
use crate::inside::processes::Command;
use crate::machine::fleet::{Fleet, WakeSource};
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::{Extension, Json};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use model::{Begun, Complete, Completed, Conflict, Create, Kind, Limits, Session, Status};
use sha2::{Digest, Sha256};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use torpor_api::{ErrorCode, MachineId};

const PART_BYTES: u64 = 8 << 20;
const MOST_BYTES: u64 = 64 << 30;
const MOST_AT_ONCE: u32 = 4;
const MOST_UPLOADS: usize = 1024;
const LIFE_MS: u64 = 24 * 3_600_000;

#[derive(Debug, Clone)]
struct Upload {
    id: String,
    machine: MachineId,
    key: Option<String>,
    order: Create,
    /// Absolute.
    target: String,
    parts: BTreeSet<u64>,
    status: Status,
    created_unix_ms: u64,
    updated_unix_ms: u64,
}

/// Uploads under way, of all machines.
#[derive(Clone, Default)]
pub(super) struct Uploads(Arc<Mutex<HashMap<String, Upload>>>);

fn failed(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::UploadFailed, message)
}

impl Upload {
    fn n_parts(&self) -> u64 {
        self.order.content_length.div_ceil(PART_BYTES)
    }

    fn part_bytes(&self, part: u64) -> u64 {
        let begin = part.saturating_mul(PART_BYTES);
        self.order.content_length.saturating_sub(begin).min(PART_BYTES)
    }

    fn staging(&self) -> String {
        format!("{}.{}", self.target.trim_end_matches('/'), self.id)
    }

    fn options(&self) -> WriteOptions {
        WriteOptions {
            user: self.order.user.clone(),
            ..WriteOptions::default()
        }
    }

    fn show(&self) -> Session {
        let accepted = self.parts.iter().map(|part| self.part_bytes(*part));
        Session {
            upload_id: self.id.clone(),
            kind: self.order.kind,
            source_kind: self.order.source_kind,
            target_path: self.target.clone(),
            content_length: self.order.content_length,
            accepted_bytes: accepted.sum(),
            reserved_staging_bytes: self.order.content_length,
            part_size: PART_BYTES,
            part_count: self.n_parts(),
            max_concurrency: MOST_AT_ONCE,
            status: self.status,
            conflict: self.order.conflict,
            checksum_algorithm: self.order.checksum_algorithm,
            limits: Limits {
                max_upload_bytes: MOST_BYTES,
                max_part_bytes: PART_BYTES,
                max_concurrency: MOST_AT_ONCE,
                machine_staging_quota_bytes: MOST_BYTES,
            },
            created_at: iso(self.created_unix_ms),
            updated_at: iso(self.updated_unix_ms),
            expires_at: iso(self.created_unix_ms.saturating_add(LIFE_MS)),
            user: self.order.user.clone(),
            next_part: (0..self.n_parts()).find(|part| !self.parts.contains(part)),
            archive_format: self.order.archive_format,
            whole_checksum_sha256: self.order.whole_checksum_sha256.clone(),
        }
    }
}

impl Uploads {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Upload>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, machine: &MachineId, id: &str) -> Result<Upload, Failure> {
        let uploads = self.lock();
        let found = uploads.get(id).filter(|upload| upload.machine == *machine);
        found.cloned().ok_or_else(|| {
            let message = format!("no upload {:?}", super::super::error::cut(id));
            Failure::new(ErrorCode::UploadNotFound, message)
        })
    }

    fn change(&self, id: &str, now_unix_ms: u64, change: impl FnOnce(&mut Upload)) -> Option<Upload> {
        let mut uploads = self.lock();
        let upload = uploads.get_mut(id)?;
        change(upload);
        upload.updated_unix_ms = now_unix_ms;
        Some(upload.clone())
    }

    fn insert(&self, upload: Upload, now_unix_ms: u64) -> Result<Upload, Failure> {
        let mut uploads = self.lock();
        uploads.retain(|_, upload| upload.created_unix_ms.saturating_add(LIFE_MS) > now_unix_ms);
        let same = |other: &&Upload| {
            upload.key.is_some() && other.key == upload.key && other.machine == upload.machine
        };
        if let Some(before) = uploads.values().find(same) {
            return Ok(before.clone());
        }
        if uploads.len() >= MOST_UPLOADS {
            return Err(Failure::new(
                ErrorCode::CapacityExceeded,
                "too many uploads are under way",
            ));
        }
        uploads.insert(upload.id.clone(), upload.clone());
        Ok(upload)
    }
}

pub(super) async fn create(
    State(fleet): State<Fleet>,
    Extension(uploads): Extension<Uploads>,
    Named(machine): Named,
    headers: HeaderMap,
    Body(order): Body<Create>,
) -> Result<Created<Begun>, Failure> {
    if order.content_length > MOST_BYTES {
        return Err(failed(format!("content_length is more than {MOST_BYTES}")));
    }
    let (inside, target) = at(&fleet, machine.clone(), &order.target_path).await?;
    // It is asked again at the end; asked now, nothing is sent in vain.
    if order.conflict == Conflict::Error && inside.exists(&target, order.user.clone()).await? {
        return Err(failed(format!("{target} exists")));
    }
    let now = fleet.now_unix_ms();
    let random: u128 = rand::random();
    let upload = Upload {
        id: format!("upl_{random:032x}"),
        machine,
        key: idempotency(&headers, &[])?.map(|idempotency| idempotency.key),
        order,
        target,
        parts: BTreeSet::new(),
        status: Status::Created,
        created_unix_ms: now,
        updated_unix_ms: now,
    };
    let upload = uploads.insert(upload, now)?;
    Ok(Created(Begun {
        session: upload.show(),
    }))
}

pub(super) async fn show(
    Extension(uploads): Extension<Uploads>,
    Named(machine): Named,
    Path((_, id)): Path<(String, String)>,
) -> Result<Json<Session>, Failure> {
    Ok(Json(uploads.find(&machine, &id)?.show()))
}

async fn read_part(request: Request, expected: u64) -> Result<Bytes, Failure> {
    let sent = request.headers().get("x-nullspace-part-sha256").cloned();
    let most = usize::try_from(PART_BYTES).unwrap_or(usize::MAX);
    let body = Limited::new(request.into_body(), most).collect().await;
    let bytes = body
        .map_err(|error| failed(format!("the part is too large or broke off: {error}")))?
        .to_bytes();
    if bytes.len() as u64 != expected {
        return Err(failed(format!(
            "the part has {} bytes, and has to have {expected}",
            bytes.len()
        )));
    }
    match sent {
        Some(sent) if !sent.as_bytes().eq_ignore_ascii_case(hex(&bytes).as_bytes()) => {
            Err(failed("the part's SHA-256 is not the one that was sent"))
        }
        Some(_) | None => Ok(bytes),
    }
}

fn hex(bytes: &[u8]) -> String {
    let digest: [u8; 32] = Sha256::digest(bytes).into();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) async fn put_part(
    State(fleet): State<Fleet>,
    Extension(uploads): Extension<Uploads>,
    Named(machine): Named,
    Path((_, id, part)): Path<(String, String, u64)>,
    request: Request,
) -> Result<Json<Session>, Failure> {
    let upload = uploads.find(&machine, &id)?;
    if !matches!(
        upload.status,
        Status::Created | Status::Uploading | Status::Staged
    ) {
        return Err(failed(format!("upload {id} takes no more parts")));
    }
    if part >= upload.n_parts() {
        return Err(failed(format!("part {part} is past the last one")));
    }
    let bytes = read_part(request, upload.part_bytes(part)).await?;
    let inside = fleet.inside(machine, WakeSource::Api);
    let options = WriteOptions {
        offset: Some(part * PART_BYTES),
        ..upload.options()
    };
    let mut writing = inside.upload(&upload.staging(), options).await?;
    writing.write(&bytes).await?;
    writing.finish().await?;
    let changed = uploads.change(&id, fleet.now_unix_ms(), |upload| {
        upload.parts.insert(part);
        upload.status = if upload.parts.len() as u64 == upload.n_parts() {
            Status::Staged
        } else {
            Status::Uploading
        };
    });
    Ok(Json(changed.unwrap_or(upload).show()))
}

/// A command that has to succeed.
async fn must(inside: &Inside, upload: &Upload, argv: &[&str], what: &str) -> Result<String, Failure> {
    let command = Command {
        user: upload.order.user.clone(),
        cwd: Some("/".to_owned()),
        ..Command::argv(argv.iter().map(|text| (*text).to_owned()).collect())
    };
    let output = inside.run(command, None).await?;
    if output.code == 0 {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(failed(format!("{what}: {}", said.trim())))
    }
}

async fn publish(inside: &Inside, upload: &Upload, wanted: Option<String>) -> Result<u64, Failure> {
    let (staging, target) = (upload.staging(), upload.target.as_str());
    let user = || upload.order.user.clone();
    if upload.n_parts() == 0 {
        inside.upload(&staging, upload.options()).await?.finish().await?;
    }
    if let Some(wanted) = wanted {
        let line = must(
            inside,
            upload,
            &["sha256sum", "--", &staging],
            "cannot sum the upload",
        )
        .await?;
        // A name that has to be quoted is announced by a backslash.
        let sum = line
            .trim_start_matches('\\')
            .split(' ')
            .next()
            .unwrap_or_default();
        if !sum.eq_ignore_ascii_case(&wanted) {
            return Err(failed("the SHA-256 of the whole is not the one that was sent"));
        }
    }
    let exists = inside.exists(target, user()).await?;
    if exists && upload.order.conflict == Conflict::Error {
        return Err(failed(format!("{target} exists")));
    }
    if upload.order.kind == Kind::File {
        inside.rename(&staging, target, user()).await?;
        return Ok(1);
    }
    if exists && upload.order.conflict == Conflict::Replace {
        inside.remove(target, true, user()).await?;
    }
    inside.make_dir(target, user()).await?;
    let argv = [
        "tar",
        "--extract",
        "--no-same-owner",
        "--directory",
        target,
        "--file",
        &staging,
    ];
    must(inside, upload, &argv, "cannot unpack the upload").await?;
    let listed = must(
        inside,
        upload,
        &["tar", "--list", "--file", &staging],
        "cannot read the upload",
    )
    .await?;
    inside.remove(&staging, false, user()).await?;
    Ok(listed.lines().filter(|line| !line.ends_with('/')).count() as u64)
}

pub(super) async fn complete(
    State(fleet): State<Fleet>,
    Extension(uploads): Extension<Uploads>,
    Named(machine): Named,
    Path((_, id)): Path<(String, String)>,
    OptionalJson(body): OptionalJson<Complete>,
) -> Result<Json<Completed>, Failure> {
    let upload = uploads.find(&machine, &id)?;
    if upload.status == Status::Completed {
        return Ok(Json(completed(&upload, 1)));
    }
    if upload.parts.len() as u64 != upload.n_parts() {
        return Err(failed(format!("upload {id} lacks parts")));
    }
    if matches!(upload.status, Status::Completing | Status::Aborted) {
        return Err(failed(format!("upload {id} is being completed, or was aborted")));
    }
    let now = fleet.now_unix_ms();
    uploads.change(&id, now, |upload| upload.status = Status::Completing);
    let wanted = body
        .whole_checksum_sha256
        .or_else(|| upload.order.whole_checksum_sha256.clone());
    let inside = fleet.inside(machine, WakeSource::Api);
    let outcome = publish(&inside, &upload, wanted).await;
    let status = if outcome.is_ok() {
        Status::Completed
    } else {
        Status::Staged
    };
    let changed = uploads.change(&id, now, |upload| upload.status = status);
    Ok(Json(completed(&changed.unwrap_or(upload), outcome?)))
}

fn completed(upload: &Upload, n_files: u64) -> Completed {
    Completed {
        session: upload.show(),
        published_bytes: upload.order.content_length,
        published_file_count: n_files,
    }
}

pub(super) async fn abort(
    State(fleet): State<Fleet>,
    Extension(uploads): Extension<Uploads>,
    Named(machine): Named,
    Path((_, id)): Path<(String, String)>,
) -> Result<NoContent, Failure> {
    let upload = uploads.find(&machine, &id)?;
    uploads.change(&id, fleet.now_unix_ms(), |upload| upload.status = Status::Aborted);
    let inside = fleet.inside(machine, WakeSource::Api);
    match inside
        .remove(&upload.staging(), false, upload.order.user.clone())
        .await
    {
        Ok(()) => {}
        // No part ever came, or all of it is where it belongs.
        Err(error) if error.code == ErrorCode::FileNotFound => {}
        Err(error) => return Err(error.into()),
    }
    Ok(NoContent)
}
