//! Files of a machine. All of it wakes. Contents are streamed; nothing here holds more than a frame of them.
//!
//! Paths are absolute. An operation for a user is done with that user's rights in the guest.

mod transfer;

use super::{About, Inside, failed};
use crate::guest_client::files::Listing;
use crate::machine::error::MachineError;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use std::fmt::Display;
use torpor_api::ErrorCode;
use torpor_api::guest::{FileAttributes, FileEntry, GuestRequest};

pub use crate::guest_client::files::WriteOptions;
pub use transfer::{Download, Upload};

/// A part of a directory's entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListPage {
    /// By name, each directory followed by what it holds.
    pub entries: Vec<FileEntry>,
    /// There are more.
    pub more: bool,
}

impl Inside {
    /// Write a file from a stream: the number of bytes written.
    ///
    /// # Errors
    /// As of [`Inside::upload`]; a stream that fails leaves what came, and is `invalid_request`.
    pub async fn upload_stream<E: Display>(
        &self,
        path: &str,
        options: WriteOptions,
        contents: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<u64, MachineError> {
        let mut upload = self.upload(path, options).await?;
        let mut contents = std::pin::pin!(contents);
        while let Some(bytes) = contents.next().await {
            let bytes = bytes.map_err(|error| {
                MachineError::new(
                    ErrorCode::InvalidRequest,
                    format!("the contents broke off: {error}"),
                )
            })?;
            upload.write(&bytes).await?;
        }
        upload.finish().await
    }

    /// A page of a directory's entries, `depth` levels deep.
    ///
    /// # Errors
    /// The wake's, the guest's, or `guest_unreachable`.
    pub async fn list(
        &self,
        path: &str,
        depth: u32,
        (skip, limit): (u64, u64),
        user: Option<String>,
    ) -> Result<ListPage, MachineError> {
        let presence = self.presence("list").await?;
        let read = async {
            let window = (skip, Some(limit));
            let mut listing = presence.guest.list(path.to_owned(), depth, window, user).await?;
            collect(&mut listing, limit).await
        };
        presence
            .during(async { read.await.map_err(failed(About::File)) })
            .await
    }

    /// What is at a path; of what a link points to if `follow`.
    ///
    /// # Errors
    /// The wake's, the guest's, or `guest_unreachable`.
    pub async fn stat(
        &self,
        path: &str,
        follow: bool,
        user: Option<String>,
    ) -> Result<FileEntry, MachineError> {
        let presence = self.presence("stat").await?;
        let asked = async {
            let entry = presence.guest.stat(path.to_owned(), follow, user).await;
            entry.map_err(failed(About::File))
        };
        presence.during(asked).await
    }

    /// Is there anything at a path?
    ///
    /// # Errors
    /// The wake's, the guest's, or `guest_unreachable`.
    pub async fn exists(&self, path: &str, user: Option<String>) -> Result<bool, MachineError> {
        match self.stat(path, false, user).await {
            Ok(_) => Ok(true),
            Err(error) if error.code == ErrorCode::FileNotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Make a directory and its parents.
    ///
    /// # Errors
    /// The wake's, the guest's, or `guest_unreachable`.
    pub async fn make_dir(&self, path: &str, user: Option<String>) -> Result<(), MachineError> {
        let path = path.to_owned();
        self.change("mkdir", GuestRequest::MakeDir { path, user }).await
    }

    /// Remove a file or an empty directory, or, if `recursive`, a directory with everything in it.
    ///
    /// # Errors
    /// The wake's, the guest's, or `guest_unreachable`.
    pub async fn remove(
        &self,
        path: &str,
        recursive: bool,
        user: Option<String>,
    ) -> Result<(), MachineError> {
        let path = path.to_owned();
        let request = GuestRequest::FileRemove {
            path,
            recursive,
            user,
        };
        self.change("remove", request).await
    }

    /// Rename; what is at the new path is replaced.
    ///
    /// # Errors
    /// The wake's, the guest's, or `guest_unreachable`.
    pub async fn rename(&self, from: &str, to: &str, user: Option<String>) -> Result<(), MachineError> {
        let (from, to) = (from.to_owned(), to.to_owned());
        self.change("rename", GuestRequest::FileMove { from, to, user })
            .await
    }

    /// Make a symbolic link.
    ///
    /// # Errors
    /// The wake's, the guest's, or `guest_unreachable`.
    pub async fn symlink(&self, path: &str, target: &str, user: Option<String>) -> Result<(), MachineError> {
        let (path, target) = (path.to_owned(), target.to_owned());
        self.change("symlink", GuestRequest::Symlink { path, target, user })
            .await
    }

    /// Change mode, owner, size or times.
    ///
    /// # Errors
    /// The wake's, the guest's, or `guest_unreachable`.
    pub async fn set_attributes(
        &self,
        path: &str,
        attributes: FileAttributes,
        user: Option<String>,
    ) -> Result<(), MachineError> {
        let path = path.to_owned();
        let request = GuestRequest::FileSet {
            path,
            attributes,
            user,
        };
        self.change("set attributes", request).await
    }

    async fn change(&self, operation: &'static str, request: GuestRequest) -> Result<(), MachineError> {
        let presence = self.presence(operation).await?;
        let changed = async {
            let changed = presence.guest.change_files(operation, &request).await;
            changed.map_err(failed(About::File))
        };
        presence.during(changed).await
    }
}

async fn collect(
    listing: &mut Listing,
    limit: u64,
) -> Result<ListPage, crate::guest_client::GuestClientError> {
    let mut entries = Vec::new();
    loop {
        match listing.next().await? {
            Ok(more) => entries.extend(more),
            Err(more) => return Ok(ListPage { entries, more }),
        }
        // A guest that sends more than it was asked for is not believed for ever.
        if entries.len() as u64 > limit {
            return Ok(ListPage { entries, more: true });
        }
    }
}
