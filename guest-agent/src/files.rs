//! Files of the guest for the host: list, stat, read, write, make, change, move, remove.
//!
//! Paths are absolute and otherwise taken as they are: the agent is root and the machine belongs to
//! whoever asks. An operation for another user gives its thread's rights away before it touches anything.
//! Contents and lists are streamed through one bounded buffer. Only regular files are read and
//! written, so that no FIFO or device can hold a thread; writing keeps an existing file's owner, mode
//! and links, which is why it is done in place.

mod list;
mod remove;
mod transfer;

pub use list::{Wanted, list, stat};
pub use transfer::{How, read, write};

use crate::accounts::{Account, AccountError};
use crate::errors::Failed;
use crate::sys::process::become_on_this_thread;
use crate::wire::WireError;
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use torpor_api::guest::{FileAttributes, FrameType, GuestResponse};

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
    /// No such user.
    #[error(transparent)]
    Account(#[from] AccountError),
    /// The thread could not become the user.
    #[error("cannot become user {user:?}")]
    Become {
        /// User.
        user: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Contradicts itself.
    #[error("append and offset exclude each other")]
    AppendAt,
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

/// Give this thread's rights away to a user, for good; the thread serves this one operation.
pub fn act_as(user: Option<&str>) -> Result<(), Failed> {
    let Some(user) = user else { return Ok(()) };
    let account = Account::find(user).map_err(FileError::Account)?;
    if account.credentials.uid == nix::unistd::Uid::effective() {
        return Ok(());
    }
    become_on_this_thread(&account.credentials).map_err(|source| {
        FileError::Become {
            user: user.to_owned(),
            source,
        }
        .into()
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

/// Make a symbolic link.
pub fn symlink(path: &str, target: &str) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    std::os::unix::fs::symlink(target, path).map_err(FileError::at("make link", path))?;
    Ok(GuestResponse::Done)
}

/// Change attributes. Owner before mode, because a change of owner clears set-user-ID bits.
pub fn set(path: &str, attributes: &FileAttributes) -> Result<GuestResponse, Failed> {
    let path = absolute(path)?;
    check_mode(attributes.mode)?;
    if attributes.uid.is_some() || attributes.gid.is_some() {
        std::os::unix::fs::chown(path, attributes.uid, attributes.gid)
            .map_err(FileError::at("change the owner of", path))?;
    }
    if let Some(mode) = attributes.mode {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(FileError::at("set the mode of", path))?;
    }
    if let Some(size) = attributes.size {
        let file = transfer::open_regular(OpenOptions::new().write(true), path)?;
        file.set_len(size).map_err(FileError::at("truncate", path))?;
    }
    if attributes.accessed_unix_ms.is_some() || attributes.modified_unix_ms.is_some() {
        let time = |ms: Option<i64>| {
            ms.map_or(TimeSpec::UTIME_OMIT, |ms| {
                TimeSpec::new(ms.div_euclid(1000), ms.rem_euclid(1000) * 1_000_000)
            })
        };
        utimensat(
            AT_FDCWD,
            path,
            &time(attributes.accessed_unix_ms),
            &time(attributes.modified_unix_ms),
            UtimensatFlags::FollowSymlink,
        )
        .map_err(|errno| FileError::at("set the times of", path)(errno.into()))?;
    }
    Ok(GuestResponse::Done)
}

fn check_mode(mode: Option<u32>) -> Result<(), FileError> {
    match mode.filter(|mode| mode & !0o7777 != 0) {
        Some(mode) => Err(FileError::BadMode(mode)),
        None => Ok(()),
    }
}
