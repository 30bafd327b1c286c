//! Contents of files in the guest, as streams: nothing here holds more than one frame.

use std::io;

use bytes::Bytes;
use futures_util::Stream;
use tokio::io::AsyncRead;
use tokio_util::io::StreamReader;
use torpor_api::guest::{FrameType, GuestRequest, GuestResponse, MAX_PAYLOAD};

use super::channel::{Channel, last_frame};
use super::{ANSWER_DEADLINE, GuestClient, GuestClientError, bounded, unexpected};

/// Bytes of a file on their way out of the guest.
pub struct FileRead(Channel);

/// A file on its way into the guest.
pub struct FileWrite(Channel);

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
    ) -> Result<FileRead, GuestClientError> {
        let request = GuestRequest::FileRead { path, offset, len };
        Ok(FileRead(self.open("read file", &request).await?))
    }

    /// Write the file at `path`; what was there is replaced, or added to if `append`.
    ///
    /// # Errors
    /// See [`GuestClientError`]; the agent's own refusal comes at [`FileWrite::finish`] or before.
    pub async fn write_file(
        &self,
        path: String,
        mode: Option<u32>,
        append: bool,
    ) -> Result<FileWrite, GuestClientError> {
        let request = GuestRequest::FileWrite { path, mode, append };
        Ok(FileWrite(self.open("write file", &request).await?))
    }

    async fn open(
        &self,
        operation: &'static str,
        request: &GuestRequest,
    ) -> Result<Channel, GuestClientError> {
        bounded(operation, ANSWER_DEADLINE, async {
            let mut channel = Channel::open(&self.socket).await?;
            channel.send_request(request).await?;
            Ok(channel)
        })
        .await
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
