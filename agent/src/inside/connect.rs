//! TCP connections into the guest, as a process inside would make them.
//!
//! The guest's own address is tried first, through the slot; what listens on loopback only, or another address that
//! only the guest reaches, is reached through the agent. A task per connection carries the bytes, which count as
//! activity; the open connection does not. One through the slot outlasts pauses, and its next bytes wake the machine;
//! one through the agent ends with the execution.

use super::{About, Inside, failed};
use crate::guest_client::channel::{Channel, FrameReceiver, FrameSender, last_frame};
use crate::machine::error::MachineError;
use crate::machine::fleet::{Fleet, Presence};
use crate::machine::gate::Gate;
use crate::machine::hypervisor::ConnectError;
use crate::waker::lasting;
use bytes::Bytes;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use torpor_api::ErrorCode;
use torpor_api::activity::ActivitySource;
use torpor_api::guest::FrameType;
use torpor_proxy::{Awake, Line};

/// Bytes that wait in each direction, at most.
const BUFFER_BYTES: usize = 64 << 10;

impl Inside {
    /// A connection to `host` and `port` as seen from the guest; `host` is an address or `localhost`. Wakes.
    ///
    /// # Errors
    /// The wake's, `service_unreachable` if nothing accepts there, or `invalid_request`.
    pub async fn connect(&self, host: &str, port: u16) -> Result<DuplexStream, MachineError> {
        let address = address(host)?;
        let presence = self.presence("connect").await?;
        let (far, line) = presence.during(self.reach(&presence, address, port)).await?;
        let (near, ours) = tokio::io::duplex(BUFFER_BYTES);
        let over = line.as_ref().map_or(presence.over(), |line| line.over().clone());
        let carrier = Carrier {
            fleet: self.fleet.clone(),
            gate: presence.leave(),
            line,
        };
        tokio::spawn(over.run_until_cancelled_owned(carrier.carry(far, ours)));
        Ok(near)
    }

    async fn reach(
        &self,
        presence: &Presence,
        address: IpAddr,
        port: u16,
    ) -> Result<(Far, Option<Arc<dyn Line>>), MachineError> {
        if address.is_loopback() || address.is_unspecified() {
            match presence.connect(port).await {
                Ok(stream) => {
                    let from = (self.source, None);
                    let made = (&stream, presence.epoch());
                    let line = lasting(&self.fleet, made, (&self.machine, port), from)
                        .map_err(|refusal| MachineError::new(refusal.code, refusal.message))?;
                    return Ok((Far::tcp(stream), Some(line)));
                }
                // It may listen on loopback only.
                Err(ConnectError::Refused { .. }) => {}
                Err(error) => return Err(MachineError::new(ErrorCode::GuestUnreachable, error.to_string())),
            }
        }
        let address = if address.is_unspecified() {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        } else {
            address
        };
        Ok((through_the_agent(presence, address, port).await?, None))
    }
}

fn address(host: &str) -> Result<IpAddr, MachineError> {
    match host {
        "localhost" | "" => Ok(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        host => host.parse().map_err(|_| {
            let host: String = host.chars().take(64).collect();
            let message =
                format!("{host:?} is neither an address nor localhost, and names are not looked up");
            MachineError::new(ErrorCode::InvalidRequest, message)
        }),
    }
}

async fn through_the_agent(presence: &Presence, address: IpAddr, port: u16) -> Result<Far, MachineError> {
    let mut channel = presence
        .guest
        .forward(address, port)
        .await
        .map_err(failed(About::Process))?;
    let frame = channel.receiver.next().await.map_err(failed(About::Process))?;
    if frame.kind == FrameType::Data {
        return Ok(Far::agent(channel));
    }
    let message = match last_frame(&frame) {
        Err(error) => crate::machine::error::chain(&error),
        Ok(_) => "the guest agent does not forward".to_owned(),
    };
    Err(MachineError::new(ErrorCode::ServiceUnreachable, message))
}

/// The guest's end, in two halves.
struct Far(FarReader, FarWriter);

enum FarReader {
    Tcp(OwnedReadHalf),
    Agent(FrameReceiver),
}

enum FarWriter {
    Tcp(OwnedWriteHalf),
    Agent(FrameSender),
}

impl Far {
    fn tcp(stream: TcpStream) -> Self {
        let (read, write) = stream.into_split();
        Self(FarReader::Tcp(read), FarWriter::Tcp(write))
    }

    fn agent(channel: Channel) -> Self {
        Self(
            FarReader::Agent(channel.receiver),
            FarWriter::Agent(channel.sender),
        )
    }
}

impl FarReader {
    /// The next bytes; none at the end.
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Tcp(stream) => {
                let mut buffer = bytes::BytesMut::with_capacity(BUFFER_BYTES);
                let n = stream.read_buf(&mut buffer).await?;
                Ok((n > 0).then(|| buffer.freeze()))
            }
            Self::Agent(frames) => {
                let frame = frames.next().await.map_err(io::Error::other)?;
                match frame.kind {
                    FrameType::Data => Ok(Some(frame.payload)),
                    FrameType::DataEof => Ok(None),
                    _ => Err(io::ErrorKind::InvalidData.into()),
                }
            }
        }
    }
}

impl FarWriter {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes).await,
            Self::Agent(frames) => {
                let sent = frames.send_all(FrameType::Data, bytes).await;
                sent.map_err(io::Error::other)
            }
        }
    }

    async fn end(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown().await,
            Self::Agent(frames) => frames
                .send(FrameType::DataEof, &[])
                .await
                .map_err(io::Error::other),
        }
    }
}

/// What a connection's bytes count for, and what they wake.
struct Carrier {
    fleet: Fleet,
    gate: Arc<Gate>,
    line: Option<Arc<dyn Line>>,
}

impl Carrier {
    async fn carry(self, far: Far, near: DuplexStream) {
        let (near_read, near_write) = tokio::io::split(near);
        let Far(far_read, far_write) = far;
        // A direction that breaks takes the other with it; dropping both ends tells both sides.
        let carried = tokio::try_join!(
            self.inwards(near_read, far_write),
            self.outwards(far_read, near_write)
        );
        tracing::trace!(?carried, "connection into the guest ended");
    }

    async fn awake(&self) -> io::Result<Option<Awake>> {
        match &self.line {
            Some(line) => line.awake().await.map(Some).map_err(io::Error::other),
            None => Ok(None),
        }
    }

    fn touch(&self) {
        self.gate
            .touch(ActivitySource::Sessions, self.fleet.now_unix_ms());
    }

    async fn inwards(&self, mut near: ReadHalf<DuplexStream>, mut far: FarWriter) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let n = near.read(&mut buffer).await?;
            if n == 0 {
                return far.end().await;
            }
            self.touch();
            // Held until the bytes are on their way, so that no pause gets between.
            let _awake = self.awake().await?;
            far.write(buffer.get(..n).unwrap_or_default()).await?;
        }
    }

    async fn outwards(&self, mut far: FarReader, mut near: WriteHalf<DuplexStream>) -> io::Result<()> {
        while let Some(bytes) = far.next().await? {
            self.touch();
            near.write_all(&bytes).await?;
        }
        near.shutdown().await
    }
}
