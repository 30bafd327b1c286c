//! Bytes both ways, until both sides have ended, one fails, or the guest's memory is gone.
//!
//! A tunnel outlives pauses of its machine. What a client sends needs leave from the [`Line`], which wakes the
//! machine first; while it sleeps nothing else moves, and the connection to the guest stays as it is. A WebSocket's
//! control frames are no payload: they neither wake nor count as activity. While the machine sleeps a ping is
//! answered here, a close ends the connection here, and a pong is kept for the guest. A client that ends its stream
//! while the machine sleeps is gone, and wakes nobody for it.

use super::frames::{self, CLOSE, Control, Frames, PING, Piece};
use crate::meter::Tally;
use crate::waker::{Direction, FirstByteHook, Guard, Line, WakeRefusal};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const BUFFER_BYTES: usize = 16 << 10;
/// A pause waits this long for the guest's answer to what a client sent last.
const ANSWER_PATIENCE: Duration = Duration::from_secs(1);
/// A write that took longer may have outlasted a pause's patience.
const SLOW_WRITE: Duration = Duration::from_millis(500);
/// Most control frames that are kept for a guest that sleeps.
const MAX_KEPT_BYTES: usize = 4096;
/// WebSocket close code "try again later".
const TRY_AGAIN_LATER: u16 = 1013;

/// What passes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    /// Bytes that mean nothing here.
    None,
    /// WebSocket frames.
    WebSocket,
}

/// Everything about a tunnel but its two ends.
pub(crate) struct Tunnel {
    pub(crate) framing: Framing,
    pub(crate) tally: Tally,
    /// The way to wake the machine; without one the connection ends with the execution.
    pub(crate) line: Option<Arc<dyn Line>>,
    /// Ends a tunnel without a line.
    pub(crate) over: CancellationToken,
    /// Held by a tunnel without a line until it ends.
    pub(crate) guard: Option<Guard>,
    pub(crate) on_first_byte: Option<FirstByteHook>,
    /// What the first byte's delay is counted from.
    pub(crate) accepted_at: Instant,
}

impl Tunnel {
    /// Copies both ways with half-close: an end of one direction is passed on, and the other goes on.
    pub(crate) async fn join<C, G>(self, client: C, guest: G) -> io::Result<()>
    where
        C: AsyncRead + AsyncWrite + Unpin,
        G: AsyncRead + AsyncWrite + Unpin,
    {
        let (from_client, to_client) = split(client);
        let (from_guest, to_guest) = split(guest);
        let over = self.line.as_ref().map_or(&self.over, |line| line.over()).clone();
        let guard = if self.line.is_none() { self.guard } else { None };
        let ways = Ways {
            framing: self.framing,
            tally: self.tally,
            line: self.line,
            to_client: tokio::sync::Mutex::new(ToClient {
                stream: to_client,
                frames: Frames::default(),
            }),
            held: Mutex::default(),
            first_byte: Mutex::new(self.on_first_byte.map(|hook| (hook, self.accepted_at))),
        };
        let towards_guest = TowardsGuest {
            ways: &ways,
            stream: to_guest,
            frames: Frames::default(),
            kept: Vec::new(),
        };
        let joined = tokio::select! {
            both = async { tokio::try_join!(towards_guest.run(from_client), ways.towards_client(from_guest)) } => {
                match both {
                    Ok(_) | Err(End::Quiet) => Ok(()),
                    Err(End::Broken(error)) => Err(error),
                }
            }
            () = over.cancelled() => Err(reset("the execution is over")),
        };
        drop(guard);
        joined
    }
}

/// Why both directions end at once.
enum End {
    /// The client is done.
    Quiet,
    Broken(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

struct ToClient<C> {
    stream: WriteHalf<C>,
    frames: Frames,
}

/// What both directions share.
struct Ways<C> {
    framing: Framing,
    tally: Tally,
    line: Option<Arc<dyn Line>>,
    to_client: tokio::sync::Mutex<ToClient<C>>,
    /// Keeps the machine awake until it has answered.
    held: Mutex<Option<Guard>>,
    first_byte: Mutex<Option<(FirstByteHook, Instant)>>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Ways<C> {
    async fn towards_client<G: AsyncRead + Unpin>(&self, mut guest: ReadHalf<G>) -> Result<(), End> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let n_read = guest.read(&mut buffer).await?;
            if let Some((hook, since)) = lock(&self.first_byte).take() {
                hook(since.elapsed());
            }
            let mut client = self.to_client.lock().await;
            if n_read == 0 {
                client.stream.shutdown().await?;
                return Ok(());
            }
            let bytes = &buffer[..n_read];
            let len_payload = match self.framing {
                Framing::None => n_read,
                Framing::WebSocket => client.frames.split(bytes).iter().map(len_data).sum(),
            };
            self.tally.add_parts(Direction::FromGuest, len_payload, n_read);
            if len_payload > 0 {
                lock(&self.held).take();
            }
            client.stream.write_all(bytes).await?;
            client.stream.flush().await?;
        }
    }

    /// Puts a frame of ours into the guest's stream; answers whether there was a place for it.
    async fn interject(&self, frame: &[u8]) -> Result<bool, End> {
        let mut client = self.to_client.lock().await;
        if !client.frames.is_between() {
            return Ok(false);
        }
        client.stream.write_all(frame).await?;
        client.stream.flush().await?;
        Ok(true)
    }

    /// Wakes the machine if it sleeps, and keeps it awake until it has answered or patience ends.
    async fn wake(&self) -> Result<(), End> {
        let Some(line) = &self.line else { return Ok(()) };
        let asked_at = Instant::now();
        match line.awake().await {
            Ok(awake) => {
                *lock(&self.held) = Some(awake.guard);
                if let Some(hook) = awake.on_first_byte {
                    *lock(&self.first_byte) = Some((hook, asked_at));
                }
                Ok(())
            }
            Err(refusal) => Err(self.refused(&refusal).await),
        }
    }

    async fn refused(&self, refusal: &WakeRefusal) -> End {
        tracing::debug!(
            code = refusal.code.as_str(),
            "an open connection is refused: {}",
            refusal.message
        );
        if self.framing == Framing::WebSocket {
            let mut payload = TRY_AGAIN_LATER.to_be_bytes().to_vec();
            payload.extend_from_slice(refusal.code.as_str().as_bytes());
            // A client that is gone need not be told.
            let _ = self.interject(&frames::close(&payload)).await;
        }
        End::Broken(reset("the machine was not woken"))
    }

    /// Leave to write what is no activity, if the machine runs.
    fn quietly(&self) -> Option<Option<Guard>> {
        match &self.line {
            None => Some(None),
            Some(line) => line.enter_quietly().map(Some),
        }
    }
}

struct TowardsGuest<'a, C, G> {
    ways: &'a Ways<C>,
    stream: WriteHalf<G>,
    frames: Frames,
    /// Control frames that came while the guest slept.
    kept: Vec<u8>,
}

impl<C, G> TowardsGuest<'_, C, G>
where
    C: AsyncRead + AsyncWrite + Unpin,
    G: AsyncRead + AsyncWrite + Unpin,
{
    async fn run(mut self, mut client: ReadHalf<C>) -> Result<(), End> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let ways = self.ways;
        let mut patience = None;
        loop {
            let n_read = {
                let mut reading = std::pin::pin!(client.read(&mut buffer));
                loop {
                    tokio::select! {
                        n_read = &mut reading => break n_read?,
                        () = until(patience) => {
                            patience = None;
                            lock(&ways.held).take();
                        }
                    }
                }
            };
            if n_read == 0 {
                return self.client_ended().await;
            }
            self.pass_on(&buffer[..n_read]).await?;
            patience = lock(&ways.held)
                .is_some()
                .then(|| Instant::now() + ANSWER_PATIENCE);
        }
    }

    async fn pass_on(&mut self, bytes: &[u8]) -> Result<(), End> {
        if self.ways.framing == Framing::None {
            return self.payload(bytes).await;
        }
        let mut frames = std::mem::take(&mut self.frames);
        for piece in frames.split(bytes) {
            match piece {
                Piece::Data(bytes) => self.payload(bytes).await?,
                Piece::Control(control) => self.control(control).await?,
            }
        }
        self.frames = frames;
        Ok(())
    }

    async fn payload(&mut self, bytes: &[u8]) -> Result<(), End> {
        self.ways.wake().await?;
        self.ways
            .tally
            .add_parts(Direction::ToGuest, bytes.len(), bytes.len());
        let began = Instant::now();
        self.write_kept().await?;
        self.stream.write_all(bytes).await?;
        self.stream.flush().await?;
        if began.elapsed() > SLOW_WRITE {
            self.ways.wake().await?;
        }
        Ok(())
    }

    async fn control(&mut self, control: Control) -> Result<(), End> {
        self.ways
            .tally
            .add_parts(Direction::ToGuest, 0, control.frame.len());
        if let Some(_guard) = self.ways.quietly() {
            self.write_kept().await?;
            self.stream.write_all(&control.frame).await?;
            return Ok(self.stream.flush().await?);
        }
        match control.opcode {
            PING if self.ways.interject(&frames::pong(&control.payload)).await? => {}
            CLOSE => {
                self.ways.interject(&frames::close(&control.payload)).await?;
                return Err(End::Quiet);
            }
            _ if self.kept.len() + control.frame.len() <= MAX_KEPT_BYTES => self.kept.extend(control.frame),
            _ => {}
        }
        Ok(())
    }

    async fn client_ended(mut self) -> Result<(), End> {
        let Some(_guard) = self.ways.quietly() else {
            return Err(End::Quiet);
        };
        self.write_kept().await?;
        Ok(self.stream.shutdown().await?)
    }

    async fn write_kept(&mut self) -> Result<(), End> {
        if !self.kept.is_empty() {
            self.stream.write_all(&std::mem::take(&mut self.kept)).await?;
        }
        Ok(())
    }
}

fn len_data(piece: &Piece<'_>) -> usize {
    match piece {
        Piece::Data(bytes) => bytes.len(),
        Piece::Control(_) => 0,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn reset(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, why)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
