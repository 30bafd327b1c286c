//! One forwarded TCP connection: bytes both ways until both sides are done.

use crate::backend::Stream;
use russh::Channel;
use russh::server::Msg;

pub(crate) async fn run(channel: Channel<Msg>, mut stream: Box<dyn Stream>) {
    let mut client = channel.into_stream();
    // How it ended is the two ends' own business.
    let ended = tokio::io::copy_bidirectional(&mut client, &mut stream).await;
    tracing::trace!(?ended, "forwarded connection ended");
}
