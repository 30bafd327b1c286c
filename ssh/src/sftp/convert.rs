//! From the backend's words to those of the protocol, and back.

use crate::backend::{Attributes, DirectoryEntry, FileError, FileKind, NewAttributes};
use russh_sftp::protocol::{File, FileAttributes, FileMode, StatusCode};

pub(super) fn status_code(error: &FileError) -> StatusCode {
    match error {
        FileError::NotFound(_) => StatusCode::NoSuchFile,
        FileError::Denied(_) => StatusCode::PermissionDenied,
        FileError::Unsupported(_) => StatusCode::OpUnsupported,
        FileError::Failed(_) => StatusCode::Failure,
    }
}

pub(super) fn attributes(found: &Attributes) -> FileAttributes {
    let kind = match found.kind {
        FileKind::File => FileMode::REG,
        FileKind::Directory => FileMode::DIR,
        FileKind::Symlink => FileMode::LNK,
        // Which of the four it is makes no difference to a client.
        FileKind::Other => FileMode::FIFO,
    };
    FileAttributes {
        size: Some(found.size),
        uid: Some(found.uid),
        gid: Some(found.gid),
        permissions: Some(found.mode & 0o7777 | kind.bits()),
        atime: Some(found.accessed_unix_s),
        mtime: Some(found.modified_unix_s),
        ..FileAttributes::empty()
    }
}

pub(super) fn new_attributes(asked: &FileAttributes) -> NewAttributes {
    NewAttributes {
        size: asked.size,
        mode: asked.permissions.map(|mode| mode & 0o7777),
        owner: asked.uid.zip(asked.gid),
        times_unix_s: asked.atime.zip(asked.mtime),
    }
}

pub(super) fn file(entry: &DirectoryEntry) -> File {
    let mut file = File::new(entry.name.clone(), attributes(&entry.attributes));
    if entry.attributes.kind == FileKind::Symlink && file.longname.starts_with('-') {
        file.longname.replace_range(..1, "l");
    }
    file
}
