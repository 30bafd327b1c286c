//! A raw TCP connection: held while its machine wakes, then copied both ways.
//!
//! There is no way to answer an error in bytes that are not ours, so a refusal, like a reset on the other side,
//! is a reset.

use super::Shared;
use super::tunnel::{Framing, Tunnel};
use crate::meter::Tally;
use crate::route::Route;
use crate::waker::{Cause, Connected, Target, Transport, Upstream, WakeRequest};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Serves one accepted TCP connection to its end.
pub(crate) async fn serve_tcp(shared: Arc<Shared>, stream: TcpStream, client: SocketAddr) {
    let accepted_at = Instant::now();
    let Route::Service { listen_port } = shared.route else {
        return reset(&stream);
    };
    let request = WakeRequest {
        target: Target::Service { listen_port },
        transport: Transport::Tcp,
        client,
        accepted_at,
        cause: Cause::default(),
        held: None,
    };
    let connected = tokio::select! {
        connected = shared.waker.connect(request) => connected,
        () = client_gone(&stream) => return,
    };
    match connected {
        Ok(connected) => carry(stream, connected, accepted_at).await,
        Err(refusal) => {
            tracing::debug!(
                listen_port,
                code = refusal.code.as_str(),
                "TCP refused: {}",
                refusal.message
            );
            reset(&stream);
        }
    }
}

async fn carry(mut client: TcpStream, connected: Connected, accepted_at: Instant) {
    let Upstream::Fresh(mut guest) = connected.upstream else {
        tracing::error!("the waker answered a TCP connection with a held one");
        return reset(&client);
    };
    // A socket that refuses is closed already, which the copy finds out.
    let _ = guest.set_nodelay(true);
    let tunnel = Tunnel {
        framing: Framing::None,
        tally: Tally {
            machine: connected.activity,
            also: None,
        },
        line: connected.line,
        over: connected.over,
        guard: connected.guard,
        on_first_byte: connected.on_first_byte,
        accepted_at,
    };
    if tunnel.join(&mut client, &mut guest).await.is_err() {
        // A half-copied stream must not look like one that ended.
        reset(&client);
        reset(&guest);
    }
}

/// Returns when the client has reset the connection or closed it both ways. A client that only ended its sending
/// may still wait for an answer, so that is not enough.
async fn client_gone(stream: &TcpStream) {
    loop {
        match stream.ready(Interest::ERROR).await {
            Ok(ready) if !ready.is_error() && !ready.is_write_closed() => {}
            Ok(_) | Err(_) => return,
        }
    }
}

fn reset(stream: &TcpStream) {
    // If it fails the close is an ordinary one.
    let _ = stream.set_zero_linger();
}
