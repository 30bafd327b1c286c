//! Bytes both ways, until both sides have ended, one fails, or the execution is over.

use crate::meter::{Counted, Tally};
use crate::waker::{Direction, Guard};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::io;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio_util::sync::CancellationToken;

/// Copies both ways with half-close: an end of one direction is passed on, and the other goes on.
pub(crate) async fn copy_both<A, B>(
    client: &mut Counted<A>,
    guest: &mut Counted<B>,
    over: &CancellationToken,
) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    tokio::select! {
        copied = copy_bidirectional(client, guest) => copied.map(|_| ()),
        () = over.cancelled() => Err(io::Error::new(io::ErrorKind::ConnectionReset, "the execution is over")),
    }
}

/// Joins two connections that have agreed to speak something else than HTTP.
pub(crate) async fn join_upgraded(
    client: OnUpgrade,
    guest: OnUpgrade,
    tally: Tally,
    over: CancellationToken,
    guard: Option<Guard>,
) {
    let (client, guest) = match tokio::try_join!(client, guest) {
        Ok(both) => both,
        Err(error) => {
            tracing::debug!(error = %error, "an upgraded connection closed before it began");
            return;
        }
    };
    let mut client = Counted::new(TokioIo::new(client), tally.clone(), Direction::ToGuest);
    let mut guest = Counted::new(TokioIo::new(guest), tally, Direction::FromGuest);
    if let Err(error) = copy_both(&mut client, &mut guest, &over).await {
        tracing::debug!(error = %error, "an upgraded connection broke off");
    }
    drop(guard);
}
