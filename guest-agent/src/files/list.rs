//! What is at a path, and lists of directories, streamed.
//!
//! A directory's names are sorted as far as they fit [`SORTED_BYTES`]; what is beyond comes after them in the
//! order of the disk, so that a directory of any size costs bounded memory.

use super::{FileError, absolute};
use crate::accounts::Names;
use crate::errors::Failed;
use crate::wire::{self, WireError};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use torpor_api::guest::{FileEntry, FileType, FrameType, GuestResponse};

/// Most bytes of names of one directory that are sorted.
const SORTED_BYTES: usize = 1 << 20;
/// Entries are sent when so many bytes of paths have come together.
const BATCH_BYTES: usize = 64 << 10;
/// Deepest list.
const MAX_DEPTH: u32 = 64;

/// Which entries are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Levels of directories.
    pub depth: u32,
    /// Leave out so many.
    pub skip: u64,
    /// At most so many.
    pub limit: Option<u64>,
}

/// What is at a path.
pub fn stat(path: &str, follow: bool) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    let found = if follow {
        fs::metadata(path)
    } else {
        fs::symlink_metadata(path)
    };
    let metadata = found.map_err(FileError::at("stat", path))?;
    let entry = entry(path, &metadata, &Names::read());
    Ok(GuestResponse::Stat { entry })
}

/// Send the entries of a directory as `Entries` frames.
pub fn list(socket: &mut UnixStream, path: &str, wanted: Wanted) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    let mut listing = Listing {
        socket,
        names: Names::read(),
        skip: wanted.skip,
        left: wanted.limit.unwrap_or(u64::MAX),
        more: false,
        batch: Vec::new(),
        batch_bytes: 0,
    };
    // Only the directory that was asked for has to be readable.
    let top = Children::of(path).map_err(FileError::at("list", path))?;
    listing.walk(top, wanted.depth.clamp(1, MAX_DEPTH))?;
    listing.flush()?;
    Ok(GuestResponse::Listed { more: listing.more })
}

struct Listing<'a> {
    socket: &'a mut UnixStream,
    names: Names,
    skip: u64,
    left: u64,
    more: bool,
    batch: Vec<FileEntry>,
    batch_bytes: usize,
}

impl Listing<'_> {
    fn walk(&mut self, top: Children, depth: u32) -> Result<(), FileError> {
        let mut levels = vec![top];
        while let Some(level) = levels.last_mut() {
            let Some(path) = level.next() else {
                levels.pop();
                continue;
            };
            // Gone since the directory was read.
            let Ok(metadata) = fs::symlink_metadata(&path) else {
                continue;
            };
            if self.skip > 0 {
                self.skip -= 1;
            } else if self.left == 0 {
                self.more = true;
                return Ok(());
            } else {
                self.left -= 1;
                self.add(&path, &metadata)?;
            }
            let level_count = u32::try_from(levels.len()).unwrap_or(u32::MAX);
            if metadata.is_dir()
                && level_count < depth
                && let Ok(children) = Children::of(&path)
            {
                levels.push(children);
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, metadata: &Metadata) -> Result<(), FileError> {
        let entry = entry(path, metadata, &self.names);
        self.batch_bytes += entry.path.len() + entry.name.len();
        self.batch.push(entry);
        // Names can be escaped to six times their length, and the rest of an entry is a few hundred bytes.
        if self.batch_bytes > BATCH_BYTES || self.batch.len() >= 1000 {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), FileError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let json = serde_json::to_vec(&self.batch).unwrap_or_default();
        self.batch.clear();
        self.batch_bytes = 0;
        let frame = wire::frame(FrameType::Entries, &json).map_err(|error| FileError::Wire(error.into()))?;
        self.socket
            .write_all(&frame)
            .map_err(|error| FileError::Wire(WireError::Write(error)))
    }
}

/// What a directory holds: sorted names from the back, then the rest as it comes.
struct Children {
    directory: PathBuf,
    sorted: Vec<OsString>,
    rest: fs::ReadDir,
}

impl Children {
    fn of(directory: &Path) -> io::Result<Self> {
        let mut rest = fs::read_dir(directory)?;
        let mut sorted = Vec::new();
        let mut bytes = 0;
        while bytes < SORTED_BYTES
            && let Some(found) = rest.next()
        {
            let name = found?.file_name();
            bytes += name.len();
            sorted.push(name);
        }
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Self {
            directory: directory.to_owned(),
            sorted,
            rest,
        })
    }

    fn next(&mut self) -> Option<PathBuf> {
        let name = self
            .sorted
            .pop()
            .or_else(|| Some(self.rest.next()?.ok()?.file_name()))?;
        Some(self.directory.join(name))
    }
}

fn entry(path: &Path, metadata: &Metadata, names: &Names) -> FileEntry {
    let kind = metadata.file_type();
    let (file_type, symlink_target) = if kind.is_symlink() {
        let target = fs::read_link(path).ok();
        (
            FileType::Symlink,
            target.map(|target| target.to_string_lossy().into_owned()),
        )
    } else if kind.is_dir() {
        (FileType::Directory, None)
    } else if kind.is_file() {
        (FileType::File, None)
    } else {
        (FileType::Other, None)
    };
    let name = path.file_name().unwrap_or(path.as_os_str());
    FileEntry {
        name: name.to_string_lossy().into_owned(),
        path: path.to_string_lossy().into_owned(),
        file_type,
        size: metadata.len(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        owner: names.user(metadata.uid()),
        group: names.group(metadata.gid()),
        modified_unix_ms: metadata
            .mtime()
            .saturating_mul(1000)
            .saturating_add(metadata.mtime_nsec() / 1_000_000),
        symlink_target,
    }
}
