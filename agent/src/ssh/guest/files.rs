//! The guest's files as SFTP sees them.
//!
//! The guest's own operations are generous: they make parents, replace what is there, and take any file for any
//! operation. What a POSIX client expects to fail is looked at first, so two clients can get in between; the
//! files are one owner's.

use crate::inside::Inside;
use crate::inside::files::WriteOptions;
use crate::machine::error::MachineError;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use torpor_api::ErrorCode;
use torpor_api::guest::{FileAttributes, FileEntry, FileType};
use torpor_ssh::{Attributes, DirectoryEntry, FileError, FileKind, Files, NewAttributes, OpenOrder, Place};

/// What new files and directories are not allowed to be, as with every login.
const UMASK: u32 = 0o022;
/// Entries that are read at a time.
const ENTRIES_PER_PAGE: u64 = 1000;
/// Most entries of one directory.
const MAX_ENTRIES: usize = 200_000;
/// Largest `/etc/passwd` that is looked at.
const MAX_PASSWD_BYTES: u64 = 1 << 20;

/// Files of a machine, for one user.
pub(super) struct GuestFiles {
    inside: Inside,
    user: String,
}

impl GuestFiles {
    pub(super) fn new(inside: Inside, user: String) -> Self {
        Self { inside, user }
    }

    fn user(&self) -> Option<String> {
        Some(self.user.clone())
    }

    /// What is there; `None` if nothing is.
    async fn look(&self, path: &str, follow: bool) -> Result<Option<FileEntry>, FileError> {
        match self.inside.stat(path, follow, self.user()).await {
            Ok(entry) => Ok(Some(entry)),
            Err(error) if error.code == ErrorCode::FileNotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// New things go into directories that are there.
    async fn check_parent(&self, path: &str) -> Result<(), FileError> {
        let trimmed = path.trim_end_matches('/');
        let parent = match trimmed.rsplit_once('/') {
            Some(("", _)) | None => "/",
            Some((parent, _)) => parent,
        };
        match self.look(parent, true).await? {
            Some(entry) if entry.file_type == FileType::Directory => Ok(()),
            Some(_) => Err(FileError::Failed(format!("{parent} is no directory"))),
            None => Err(FileError::NotFound(format!("no directory {parent}"))),
        }
    }

    async fn write_all(&self, path: &str, options: WriteOptions, bytes: &[u8]) -> Result<(), FileError> {
        let mut upload = self.inside.upload(path, options).await.map_err(failed)?;
        if !bytes.is_empty() {
            upload.write(bytes).await.map_err(failed)?;
        }
        upload.finish().await.map(drop).map_err(failed)
    }

    async fn read_all(&self, path: &str, part: (u64, Option<u64>)) -> Result<Bytes, MachineError> {
        let mut download = self.inside.download(path, part, self.user()).await?;
        let mut bytes = BytesMut::new();
        while let Some(chunk) = download.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.freeze())
    }
}

#[async_trait]
impl Files for GuestFiles {
    async fn home(&self) -> Result<String, FileError> {
        let passwd = match self.read_all("/etc/passwd", (0, Some(MAX_PASSWD_BYTES))).await {
            Ok(passwd) => passwd,
            // Minimal images have none.
            Err(error) if error.code == ErrorCode::FileNotFound => Bytes::new(),
            Err(error) => return Err(failed(error)),
        };
        Ok(home_in(&String::from_utf8_lossy(&passwd), &self.user))
    }

    async fn stat(&self, path: &str, follow: bool) -> Result<Attributes, FileError> {
        let entry = self
            .inside
            .stat(path, follow, self.user())
            .await
            .map_err(failed)?;
        Ok(attributes(&entry))
    }

    async fn list(&self, path: &str) -> Result<Vec<DirectoryEntry>, FileError> {
        let mut found = Vec::new();
        loop {
            let window = (found.len() as u64, ENTRIES_PER_PAGE);
            let page = self
                .inside
                .list(path, 1, window, self.user())
                .await
                .map_err(failed)?;
            let is_last = !page.more || page.entries.is_empty();
            found.extend(page.entries.iter().map(|entry| DirectoryEntry {
                name: entry.name.clone(),
                attributes: attributes(entry),
            }));
            if is_last {
                return Ok(found);
            }
            if found.len() > MAX_ENTRIES {
                return Err(FileError::Failed(format!(
                    "{path} has more than {MAX_ENTRIES} entries"
                )));
            }
        }
    }

    async fn open(&self, path: &str, order: OpenOrder) -> Result<(), FileError> {
        match self.look(path, true).await? {
            Some(_) if order.create && order.exclusive => Err(FileError::Failed(format!("{path} is there"))),
            Some(entry) if entry.file_type != FileType::File => {
                Err(FileError::Failed(format!("{path} is not a regular file")))
            }
            Some(_) if order.write && order.truncate => {
                let options = WriteOptions {
                    user: self.user(),
                    ..WriteOptions::default()
                };
                self.write_all(path, options, &[]).await
            }
            Some(_) => Ok(()),
            None if order.write && order.create => {
                self.check_parent(path).await?;
                let options = WriteOptions {
                    mode: order.mode.map(|mode| mode & !UMASK),
                    exclusive: order.exclusive,
                    user: self.user(),
                    ..WriteOptions::default()
                };
                self.write_all(path, options, &[]).await
            }
            None => Err(FileError::NotFound(format!("no file {path}"))),
        }
    }

    async fn read(&self, path: &str, offset: u64, len: u32) -> Result<Bytes, FileError> {
        self.read_all(path, (offset, Some(len.into())))
            .await
            .map_err(failed)
    }

    async fn write(&self, path: &str, place: Place, bytes: Bytes) -> Result<(), FileError> {
        let mut options = WriteOptions {
            user: self.user(),
            ..WriteOptions::default()
        };
        match place {
            Place::At(offset) => options.offset = Some(offset),
            Place::End => options.append = true,
        }
        self.write_all(path, options, &bytes).await
    }

    async fn set_attributes(&self, path: &str, new: NewAttributes) -> Result<(), FileError> {
        let ms = |seconds: u32| i64::from(seconds) * 1000;
        let attributes = FileAttributes {
            mode: new.mode,
            uid: new.owner.map(|(uid, _)| uid),
            gid: new.owner.map(|(_, gid)| gid),
            size: new.size,
            accessed_unix_ms: new.times_unix_s.map(|(accessed, _)| ms(accessed)),
            modified_unix_ms: new.times_unix_s.map(|(_, modified)| ms(modified)),
        };
        if attributes == FileAttributes::default() {
            return Ok(());
        }
        let set = self.inside.set_attributes(path, attributes, self.user()).await;
        set.map_err(failed)
    }

    async fn make_dir(&self, path: &str, mode: Option<u32>) -> Result<(), FileError> {
        if self.look(path, false).await?.is_some() {
            return Err(FileError::Failed(format!("{path} is there")));
        }
        self.check_parent(path).await?;
        self.inside.make_dir(path, self.user()).await.map_err(failed)?;
        match mode.map(|mode| mode & !UMASK) {
            None | Some(0o755) => Ok(()),
            Some(mode) => {
                let attributes = FileAttributes {
                    mode: Some(mode),
                    ..FileAttributes::default()
                };
                let set = self.inside.set_attributes(path, attributes, self.user()).await;
                set.map_err(failed)
            }
        }
    }

    async fn remove_file(&self, path: &str) -> Result<(), FileError> {
        match self.look(path, false).await? {
            Some(entry) if entry.file_type == FileType::Directory => {
                Err(FileError::Failed(format!("{path} is a directory")))
            }
            _ => self.inside.remove(path, false, self.user()).await.map_err(failed),
        }
    }

    async fn remove_dir(&self, path: &str) -> Result<(), FileError> {
        match self.look(path, false).await? {
            Some(entry) if entry.file_type != FileType::Directory => {
                Err(FileError::Failed(format!("{path} is no directory")))
            }
            _ => self.inside.remove(path, false, self.user()).await.map_err(failed),
        }
    }

    async fn rename(&self, from: &str, to: &str, replace: bool) -> Result<(), FileError> {
        if !replace && self.look(to, false).await?.is_some() {
            return Err(FileError::Failed(format!("{to} is there")));
        }
        self.inside.rename(from, to, self.user()).await.map_err(failed)
    }

    async fn symlink(&self, target: &str, path: &str) -> Result<(), FileError> {
        self.inside
            .symlink(path, target, self.user())
            .await
            .map_err(failed)
    }

    async fn read_link(&self, path: &str) -> Result<String, FileError> {
        let entry = self.inside.stat(path, false, self.user()).await.map_err(failed)?;
        entry
            .symlink_target
            .ok_or_else(|| FileError::Failed(format!("{path} is no symbolic link")))
    }

    async fn resolve(&self, path: &str) -> Result<String, FileError> {
        Ok(tidied(path))
    }
}

/// Without `.`, `..` and empty parts. Links stay: every operation follows them by itself.
fn tidied(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// The user's home directory, by name or by number.
fn home_in(passwd: &str, user: &str) -> String {
    let field = |line: &str, n: usize| line.split(':').nth(n).map(str::to_owned);
    let line = |n: usize| passwd.lines().find(|line| line.split(':').nth(n) == Some(user));
    let home = line(0).or_else(|| line(2)).and_then(|line| field(line, 5));
    let otherwise = if user == "root" { "/root" } else { "/" };
    home.filter(|home| home.starts_with('/'))
        .unwrap_or_else(|| otherwise.to_owned())
}

fn attributes(entry: &FileEntry) -> Attributes {
    let modified_unix_s = u32::try_from(entry.modified_unix_ms.div_euclid(1000)).unwrap_or(0);
    Attributes {
        kind: match entry.file_type {
            FileType::File => FileKind::File,
            FileType::Directory => FileKind::Directory,
            FileType::Symlink => FileKind::Symlink,
            FileType::Other => FileKind::Other,
        },
        size: entry.size,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        // The guest does not tell it, and most file systems hardly keep it.
        accessed_unix_s: modified_unix_s,
        modified_unix_s,
    }
}

fn failed(error: MachineError) -> FileError {
    match error.code {
        ErrorCode::FileNotFound => FileError::NotFound(error.message),
        ErrorCode::FilePermissionDenied => FileError::Denied(error.message),
        _ => FileError::Failed(error.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_never_climb_above_the_root() {
        for (path, tidy) in [
            ("/", "/"),
            ("/root/.", "/root"),
            ("/a//b/../c/", "/a/c"),
            ("/../../etc", "/etc"),
        ] {
            assert_eq!(tidied(path), tidy, "{path}");
        }
    }

    #[test]
    fn a_home_is_found_by_name_then_by_number_and_is_never_relative() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\ndev:x:1000:1000::/home/dev:\nbad:x:7:7::rel:/bin/sh\n";
        assert_eq!(home_in(passwd, "root"), "/root");
        assert_eq!(home_in(passwd, "1000"), "/home/dev");
        assert_eq!(home_in(passwd, "bad"), "/");
        assert_eq!(home_in("", "root"), "/root");
        assert_eq!(home_in("", "nobody"), "/");
    }
}
