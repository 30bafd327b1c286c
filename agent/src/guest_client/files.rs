//! Files in the guest; contents and lists as streams: nothing here holds more than one frame.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use tokio::io::AsyncRead;
use tokio_util::io::StreamReader;
use torpor_api::guest::{FileEntry, FrameType, GuestRequest, GuestResponse, MAX_PAYLOAD};

use super::channel::{Channel, last_frame};
use super::{ANSWER_DEADLINE, GuestClient, GuestClientError, bounded, unexpected};

/// Longest wait for the removal of a tree.
const REMOVE_DEADLINE: Duration = Duration::from_secs(600);

/// Bytes of a file on their way out of the guest.
pub struct FileRead(Channel);

/// A file on its way into the guest.
pub struct FileWrite(Channel);

/// How a file is written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WriteOptions {
    /// Permission bits; those of an existing file stay if not given.
    pub mode: Option<u32>,
    /// Add to what is there.
    pub append: bool,
    /// Keep what is there and begin at this byte.
    pub offset: Option<u64>,
    /// Refuse if something is there.
    pub exclusive: bool,
    /// As this user; root if not given.
    pub user: Option<String>,
}

/// Entries of a directory on their way out of the guest.
pub struct Listing(Channel);

impl GuestClient {
    /// Read the file at `path` from `offset`, at most `len` bytes if given.
    ///
    /// # Errors
    /// See [`GuestClientError`]; the agent's own refusal comes with the first chunk.
    pub async fn read_file(
        &self,
        path: String,
        offset: u64,
        len: Option<u64>,
        user: Option<String>,
    ) -> Result<FileRead, GuestClientError> {
        let request = GuestRequest::FileRead {
            path,
            offset,
            len,
            user,
        };
        Ok(FileRead(self.open("read file", &request).await?))
    }

    /// Write the file at `path`; what was there is replaced unless the options say otherwise.
    ///
    /// # Errors
    /// See [`GuestClientError`]; the agent's own refusal comes at [`FileWrite::finish`] or before.
    pub async fn write_file(
        &self,
        path: String,
        options: WriteOptions,
    ) -> Result<FileWrite, GuestClientError> {
        let request = GuestRequest::FileWrite {
            path,
            mode: options.mode,
            append: options.append,
            offset: options.offset,
            exclusive: options.exclusive,
            user: options.user,
        };
        Ok(FileWrite(self.open("write file", &request).await?))
    }

    /// Entries of the directory at `path`, `depth` levels deep, leaving out the first `skip`.
    ///
    /// # Errors
    /// See [`GuestClientError`]; the agent's own refusal comes with the first entries.
    pub async fn list(
        &self,
        path: String,
        depth: u32,
        (skip, limit): (u64, Option<u64>),
        user: Option<String>,
    ) -> Result<Listing, GuestClientError> {
        let request = GuestRequest::FileList {
            path,
            depth,
            skip,
            limit,
            user,
        };
        Ok(Listing(self.open("list", &request).await?))
    }

    /// What is at `path`; of what a link points to if `follow`.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn stat(
        &self,
        path: String,
        follow: bool,
        user: Option<String>,
    ) -> Result<FileEntry, GuestClientError> {
        match self
            .call("stat", &GuestRequest::FileStat { path, follow, user })
            .await?
        {
            GuestResponse::Stat { entry } => Ok(entry),
            other => Err(unexpected("stat", &other)),
        }
    }

    /// A change to files that has nothing to answer: [`GuestRequest::MakeDir`] and its like.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn change_files(
        &self,
        operation: &'static str,
        request: &GuestRequest,
    ) -> Result<(), GuestClientError> {
        let limit = match request {
            // A large tree takes its time, and nothing else does.
            GuestRequest::FileRemove { recursive: true, .. } => REMOVE_DEADLINE,
            _ => ANSWER_DEADLINE,
        };
        let mut channel = self.open(operation, request).await?;
        match bounded(operation, limit, channel.response()).await? {
            GuestResponse::Done => Ok(()),
            other => Err(unexpected(operation, &other)),
        }
    }
}

impl Listing {
    /// The next entries; `Err(more)` in the end, which tells whether there are more than were asked for.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn next(&mut self) -> Result<Result<Vec<FileEntry>, bool>, GuestClientError> {
        let frame = self.0.receiver.next().await?;
        if frame.kind == FrameType::Entries {
            let entries = serde_json::from_slice(&frame.payload);
            return entries.map(Ok).map_err(|error| GuestClientError::Protocol {
                what: format!("entries are malformed: {error}"),
            });
        }
        match last_frame(&frame)? {
            GuestResponse::Listed { more } => Ok(Err(more)),
            other => Err(unexpected("list", &other)),
        }
    }
}

impl FileRead {
    /// The next bytes, or `None` at the end.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>, GuestClientError> {
        let frame = self.0.receiver.next().await?;
        if frame.kind == FrameType::Data {
            return Ok(Some(frame.payload));
        }
        match last_frame(&frame)? {
            GuestResponse::Transferred { .. } => Ok(None),
            other => Err(unexpected("read file", &other)),
        }
    }

    /// The rest as a stream of chunks.
    pub fn into_stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send {
        futures_util::stream::try_unfold(self, |mut read| async move {
            let chunk = read.next_chunk().await.map_err(io::Error::other)?;
            Ok(chunk.map(|bytes| (bytes, read)))
        })
    }

    /// The rest as bytes to read.
    pub fn into_reader(self) -> impl AsyncRead + Send {
        StreamReader::new(Box::pin(self.into_stream()))
    }
}

impl FileWrite {
    /// More bytes.
    ///
    /// # Errors
    /// The agent's refusal if it ended the operation, else see [`GuestClientError`].
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestClientError> {
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            if let Err(error) = self.0.sender.send(FrameType::Data, chunk).await {
                return Err(self.why(error).await);
            }
        }
        Ok(())
    }

    /// No more bytes: the number of bytes that the guest wrote.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn finish(mut self) -> Result<u64, GuestClientError> {
        if let Err(error) = self.0.sender.send(FrameType::DataEof, &[]).await {
            return Err(self.why(error).await);
        }
        match bounded("write file", ANSWER_DEADLINE, self.0.response()).await? {
            GuestResponse::Transferred { bytes } => Ok(bytes),
            other => Err(unexpected("write file", &other)),
        }
    }

    /// An agent that refuses says why and closes, which the writer first sees as a broken pipe.
    async fn why(&mut self, broken: GuestClientError) -> GuestClientError {
        match bounded("write file", ANSWER_DEADLINE, self.0.response()).await {
            Err(refused @ GuestClientError::Refused { .. }) => refused,
            _ => broken,
        }
    }
}
