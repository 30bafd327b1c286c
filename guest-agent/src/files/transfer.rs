//! Contents of files, in and out.

use super::{FileError, absolute, check_mode};
use crate::errors::Failed;
use crate::wire::{self, WireError};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use torpor_api::guest::{FrameType, GuestResponse, HEADER_LEN};

const BUFFER_BYTES: usize = 256 << 10;

/// Send a file, or a part of it, as `Data` frames.
pub fn read(
    socket: &mut UnixStream,
    path: &str,
    offset: u64,
    len: Option<u64>,
) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    let mut file = open_regular(OpenOptions::new().read(true), path)?;
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

/// How a file is written.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Add to what is there.
    pub append: bool,
    /// Keep what is there and begin at this byte.
    pub offset: Option<u64>,
    /// Refuse if something is there.
    pub exclusive: bool,
}

/// Take a file's bytes from `Data` frames up to `DataEof`.
pub fn write(socket: &mut UnixStream, path: &str, how: How) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    check_mode(how.mode)?;
    if how.append && how.offset.is_some() {
        return Err(FileError::AppendAt.into());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(FileError::at("make directory", parent))?;
    }
    let mut options = OpenOptions::new();
    options
        .create(true)
        .create_new(how.exclusive)
        .mode(how.mode.unwrap_or(0o644))
        .append(how.append)
        .write(true);
    let mut file = open_regular(&mut options, path)?;
    match how.offset {
        Some(offset) => drop(
            file.seek(io::SeekFrom::Start(offset))
                .map_err(FileError::at("seek in", path))?,
        ),
        None if how.append => {}
        // Not O_TRUNC: what is no regular file must stay untouched.
        None => file.set_len(0).map_err(FileError::at("truncate", path))?,
    }
    if let Some(mode) = how.mode {
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

/// Open what is a regular file, and nothing else.
pub fn open_regular(options: &mut OpenOptions, path: &Path) -> Result<File, FileError> {
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
        .map_err(FileError::at("open", path))
}
