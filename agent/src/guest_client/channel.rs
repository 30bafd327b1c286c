//! One connection to the guest agent: the `CONNECT` handshake and frames both ways.
//!
//! Owns the socket. A frame's payload is allocated only after its length was checked against the protocol's
//! limit. Reading is not cancel-safe inside a frame: a dropped read leaves a channel that must be dropped too.

use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use torpor_api::guest::{
    AGENT_PORT, FrameType, GuestError, GuestRequest, GuestResponse, HEADER_LEN, MAX_PAYLOAD, decode_header,
    encode_header,
};

use super::{GuestClientError, misplaced};

/// Longest answer to `CONNECT`: `OK ` and a port number.
const MAX_ANSWER: u64 = 32;

/// A frame that came from the guest.
#[derive(Debug)]
pub struct Frame {
    /// What it holds.
    pub kind: FrameType,
    /// Its payload.
    pub payload: Bytes,
}

/// A connection that carries one operation.
pub struct Channel {
    /// Frames from the guest.
    pub receiver: FrameReceiver,
    /// Frames to the guest.
    pub sender: FrameSender,
}

/// The half that reads.
pub struct FrameReceiver {
    stream: BufReader<OwnedReadHalf>,
    /// The VMM has yet to say that the guest accepted.
    awaits_ok: bool,
}

/// The half that writes.
pub struct FrameSender(OwnedWriteHalf);

impl Channel {
    /// A connection that leads to the agent.
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        Self {
            receiver: FrameReceiver {
                stream: BufReader::with_capacity(64 << 10, read),
                awaits_ok: false,
            },
            sender: FrameSender(write),
        }
    }

    /// Wait until the agent has accepted. What is sent before that reaches it all the same, up to the few KiB that the VMM
    /// passes on ahead.
    ///
    /// # Errors
    /// Nothing listens in the guest, or the connection broke.
    pub async fn accepted(&mut self) -> Result<(), GuestClientError> {
        self.receiver.accepted().await
    }

    /// Open with the operation's request.
    ///
    /// # Errors
    /// The connection broke, or the request is too long for a frame.
    pub async fn send_request(&mut self, request: &GuestRequest) -> Result<(), GuestClientError> {
        let json = serde_json::to_vec(request).map_err(|error| GuestClientError::Protocol {
            what: format!("request has no JSON: {error}"),
        })?;
        self.sender.send(FrameType::Request, &json).await
    }

    /// The response, for operations that have nothing before it.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn response(&mut self) -> Result<GuestResponse, GuestClientError> {
        let frame = self.receiver.next().await?;
        last_frame(&frame)
    }
}

impl FrameReceiver {
    /// The next frame.
    ///
    /// # Errors
    /// The guest closed, or sent what is no frame.
    pub async fn next(&mut self) -> Result<Frame, GuestClientError> {
        self.accepted().await?;
        let mut header = [0; HEADER_LEN];
        self.stream
            .read_exact(&mut header)
            .await
            .map_err(io("read from"))?;
        let (kind, len) = decode_header(header).map_err(|error| GuestClientError::Protocol {
            what: error.to_string(),
        })?;
        let mut payload = vec![0; len];
        self.stream
            .read_exact(&mut payload)
            .await
            .map_err(io("read from"))?;
        Ok(Frame {
            kind,
            payload: payload.into(),
        })
    }

    async fn accepted(&mut self) -> Result<(), GuestClientError> {
        if !self.awaits_ok {
            return Ok(());
        }
        let mut answer = Vec::new();
        let mut line = (&mut self.stream).take(MAX_ANSWER);
        let read = line.read_until(b'\n', &mut answer).await;
        read.map_err(io("read from"))?;
        if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
            self.awaits_ok = false;
            return Ok(());
        }
        Err(GuestClientError::NotListening {
            port: AGENT_PORT,
            answer: String::from_utf8_lossy(&answer).into_owned(),
        })
    }
}

impl FrameSender {
    /// Send one frame.
    ///
    /// # Errors
    /// The connection broke, or the payload is over the protocol's limit.
    pub async fn send(&mut self, kind: FrameType, payload: &[u8]) -> Result<(), GuestClientError> {
        let header = encode_header(kind, payload.len()).map_err(|error| GuestClientError::Protocol {
            what: error.to_string(),
        })?;
        if payload.len() <= 4096 {
            let mut frame = Vec::with_capacity(HEADER_LEN + payload.len());
            frame.extend_from_slice(&header);
            frame.extend_from_slice(payload);
            return self.0.write_all(&frame).await.map_err(io("write to"));
        }
        self.0.write_all(&header).await.map_err(io("write to"))?;
        self.0.write_all(payload).await.map_err(io("write to"))
    }

    /// Send bytes of any length in frames of this kind.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn send_all(&mut self, kind: FrameType, bytes: &[u8]) -> Result<(), GuestClientError> {
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            self.send(kind, chunk).await?;
        }
        Ok(())
    }
}

/// What a frame that must be the last one says.
///
/// # Errors
/// The agent's refusal, or a frame that is neither response nor error.
pub fn last_frame(frame: &Frame) -> Result<GuestResponse, GuestClientError> {
    let malformed = |error: serde_json::Error| GuestClientError::Protocol {
        what: format!("last frame is malformed: {error}"),
    };
    match frame.kind {
        FrameType::Response => serde_json::from_slice(&frame.payload).map_err(malformed),
        FrameType::Error => {
            let source: GuestError = serde_json::from_slice(&frame.payload).map_err(malformed)?;
            Err(GuestClientError::Refused { source })
        }
        other => Err(misplaced(other)),
    }
}

/// A way to the agent inside a guest.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// A new connection to it, on its way: see [`Channel::accepted`].
    async fn dial(&self) -> Result<Channel, GuestClientError>;
}

/// The way through a VMM's vsock socket.
#[derive(Debug)]
pub(super) struct Vsock(pub(super) PathBuf);

#[async_trait]
impl Dial for Vsock {
    async fn dial(&self) -> Result<Channel, GuestClientError> {
        let mut stream = UnixStream::connect(&self.0)
            .await
            .map_err(|source| GuestClientError::Connect {
                path: self.0.clone(),
                source,
            })?;
        let line = format!("CONNECT {AGENT_PORT}\n");
        stream.write_all(line.as_bytes()).await.map_err(io("write to"))?;
        let mut channel = Channel::over(stream);
        channel.receiver.awaits_ok = true;
        Ok(channel)
    }
}

fn io(operation: &'static str) -> impl Fn(std::io::Error) -> GuestClientError {
    move |source| match source.kind() {
        std::io::ErrorKind::UnexpectedEof
        | std::io::ErrorKind::ConnectionReset
        | std::io::ErrorKind::BrokenPipe => GuestClientError::Closed,
        _ => GuestClientError::Io { operation, source },
    }
}
