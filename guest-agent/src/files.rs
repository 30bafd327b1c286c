//! Files of the guest for the host: list, stat, read, write, make, move, remove.
//!
//! Paths are absolute and otherwise taken as they are: the agent is root and the machine belongs to
//! whoever asks. Contents are streamed through one bounded buffer. Only regular files are read and
//! written, so that no FIFO or device can hold a thread; writing keeps an existing file's owner, mode
//! and links, which is why it is done in place.

mod remove;

use crate::errors::Failed;
use crate::wire::{self, WireError};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use torpor_api::guest::{FileEntry, FileType, FrameType, GuestResponse, HEADER_LEN, MAX_PAYLOAD};

const BUFFER_BYTES: usize = 256 << 10;

/// Why a file operation failed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Not absolute, or with a NUL byte.
    #[error("{path:?} is no absolute path")]
    BadPath {
        /// Path.
        path: String,
    },
    /// The operating system refused.
    #[error("cannot {operation} {path:?}")]
    Path {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The operating system refused a rename.
    #[error("cannot move {from:?} to {to:?}")]
    Move {
        /// From.
        from: PathBuf,
        /// To.
        to: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory, device, pipe or socket.
    #[error("{path:?} is not a regular file")]
    NotAFile {
        /// Path.
        path: PathBuf,
    },
    /// Not permission bits.
    #[error("{0:#o} are no permission bits")]
    BadMode(u32),
    /// A list that no frame can hold.
    #[error("{path:?} has {count} entries, more than one answer holds")]
    TooManyEntries {
        /// Directory.
        path: PathBuf,
        /// Entries seen.
        count: usize,
    },
    /// The client's frames broke off.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The client sent what it must not.
    #[error("{0:?} is no frame of a file write")]
    UnexpectedFrame(FrameType),
}

impl FileError {
    fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Path {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

fn absolute(path: &str) -> Result<&Path, FileError> {
    if path.starts_with('/') && !path.contains('\0') {
        Ok(Path::new(path))
    } else {
        Err(FileError::BadPath {
            path: path.to_owned(),
        })
    }
}

/// Entries of a directory, by name.
pub fn list(path: &str) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    let mut entries = Vec::new();
    let mut len_bytes = 0;
    for found in fs::read_dir(path).map_err(FileError::at("list", path))? {
        let found = found.map_err(FileError::at("list", path))?.path();
        match entry(&found) {
            // Gone since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(FileError::at("stat", &found)(error).into()),
            Ok(entry) => {
                // What JSON adds is bounded below here; `wire` has the last word.
                len_bytes += entry.path.len() + entry.name.len() + 64;
                entries.push(entry);
            }
        }
        if len_bytes > MAX_PAYLOAD {
            return Err(FileError::TooManyEntries {
                path: path.to_owned(),
                count: entries.len(),
            }
            .into());
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(GuestResponse::List { entries })
}

/// What is at a path; links are not followed.
pub fn stat(path: &str) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    let entry = entry(path).map_err(FileError::at("stat", path))?;
    Ok(GuestResponse::Stat { entry })
}

fn entry(path: &Path) -> io::Result<FileEntry> {
    let metadata = fs::symlink_metadata(path)?;
    let kind = metadata.file_type();
    let (file_type, symlink_target) = if kind.is_symlink() {
        (
            FileType::Symlink,
            fs::read_link(path)
                .ok()
                .map(|target| target.to_string_lossy().into_owned()),
        )
    } else if kind.is_dir() {
        (FileType::Directory, None)
    } else if kind.is_file() {
        (FileType::File, None)
    } else {
        (FileType::Other, None)
    };
    let name = path
        .file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned();
    Ok(FileEntry {
        name,
        path: path.to_string_lossy().into_owned(),
        file_type,
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_unix_ms: metadata
            .mtime()
            .saturating_mul(1000)
            .saturating_add(metadata.mtime_nsec() / 1_000_000),
        symlink_target,
    })
}

/// Make a directory and its parents.
pub fn make_dir(path: &str) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    fs::create_dir_all(path).map_err(FileError::at("make directory", path))?;
    Ok(GuestResponse::Done)
}

/// Rename.
pub fn rename(from: &str, to: &str) -> Result<GuestResponse, Failed> {
    let (from, to) = (absolute(from)?, absolute(to)?);
    fs::rename(from, to).map_err(|source| FileError::Move {
        from: from.to_owned(),
        to: to.to_owned(),
        source,
    })?;
    Ok(GuestResponse::Done)
}

/// Remove a file, an empty directory or, if asked, a directory with everything in it.
pub fn remove(path: &str, recursive: bool) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    let metadata = fs::symlink_metadata(path).map_err(FileError::at("remove", path))?;
    let removed = match (metadata.is_dir(), recursive) {
        (false, _) => fs::remove_file(path),
        (true, false) => fs::remove_dir(path),
        (true, true) => remove::remove_tree(path),
    };
    removed.map_err(FileError::at("remove", path))?;
    Ok(GuestResponse::Done)
}

/// Send a file, or a part of it, as `Data` frames.
pub fn read(
    socket: &mut UnixStream,
    path: &str,
    offset: u64,
    len: Option<u64>,
) -> Result<GuestResponse, Failed> {
    use io::Seek;
    let path = absolute(path)?;
    let mut file = open_regular(OpenOptions::new().read(true), "open", path)?;
    if offset > 0 {
        file.seek(io::SeekFrom::Start(offset))
            .map_err(FileError::at("seek in", path))?;
    }
    let mut file = file.take(len.unwrap_or(u64::MAX));
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut bytes = 0u64;
    loop {
        let n = match file.read(&mut buffer) {
            Ok(0) => return Ok(GuestResponse::Transferred { bytes }),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(FileError::at("read", path)(error).into()),
        };
        let frame = wire::frame(FrameType::Data, buffer.get(..n).unwrap_or_default());
        let frame = frame.map_err(|error| FileError::Wire(error.into()))?;
        socket
            .write_all(&frame)
            .map_err(|error| FileError::Wire(WireError::Write(error)))?;
        bytes += u64::try_from(frame.len() - HEADER_LEN).unwrap_or(0);
    }
}

/// Take a file's bytes from `Data` frames up to `DataEof`.
pub fn write(
    socket: &mut UnixStream,
    path: &str,
    mode: Option<u32>,
    append: bool,
) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    if let Some(mode) = mode.filter(|mode| mode & !0o7777 != 0) {
        return Err(FileError::BadMode(mode).into());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(FileError::at("make directory", parent))?;
    }
    let mut options = OpenOptions::new();
    options
        .create(true)
        .mode(mode.unwrap_or(0o644))
        .append(append)
        .write(true);
    let mut file = open_regular(&mut options, "open", path)?;
    if !append {
        // Not O_TRUNC: what is no regular file must stay untouched.
        file.set_len(0).map_err(FileError::at("truncate", path))?;
    }
    if let Some(mode) = mode {
        file.set_permissions(fs::Permissions::from_mode(mode))
            .map_err(FileError::at("set the mode of", path))?;
    }
    receive(socket, &mut file, path)
}

fn receive(socket: &mut UnixStream, file: &mut File, path: &Path) -> Result<GuestResponse, Failed> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut bytes = 0u64;
    loop {
        let (kind, mut left) = wire::read_header(socket).map_err(FileError::Wire)?;
        match kind {
            FrameType::Data => {}
            FrameType::DataEof if left == 0 => return Ok(GuestResponse::Transferred { bytes }),
            other => return Err(FileError::UnexpectedFrame(other).into()),
        }
        while left > 0 {
            let part = buffer.get_mut(..left.min(BUFFER_BYTES)).unwrap_or_default();
            socket
                .read_exact(part)
                .map_err(|error| FileError::Wire(WireError::Read(error)))?;
            file.write_all(part).map_err(FileError::at("write", path))?;
            left -= part.len();
            bytes += u64::try_from(part.len()).unwrap_or(0);
        }
    }
}

fn open_regular(options: &mut OpenOptions, operation: &'static str, path: &Path) -> Result<File, FileError> {
    use nix::libc::{O_NOCTTY, O_NONBLOCK};
    // Looked at before it is opened, because opening a device can already act on it. The race with
    // whoever swaps it in between is one that the machine's owner plays against himself.
    if let Ok(metadata) = fs::metadata(path)
        && !metadata.is_file()
    {
        return Err(FileError::NotAFile {
            path: path.to_owned(),
        });
    }
    options
        .custom_flags(O_NONBLOCK | O_NOCTTY)
        .open(path)
        .map_err(FileError::at(operation, path))
}
