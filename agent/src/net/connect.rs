//! TCP sockets inside a slot's namespace.
//!
//! A socket belongs to the namespace of the thread that makes it. One thread per process makes them all, because
//! entering a namespace and going back takes two system calls, and a thread of the runtime must never be left in
//! one. It returns to its own namespace after each socket, so that it keeps no slot alive. The connect itself is
//! the caller's and does not block anybody.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;
use torpor_api::vmm::GUEST_IP;

use super::namespace;

/// Sockets that may be waited for at the same time; more are refused.
const QUEUE: usize = 1024;

struct Job {
    netns: Arc<File>,
    answer: oneshot::Sender<io::Result<OwnedFd>>,
}

/// A connection to a port of the guest in `netns`.
pub(super) async fn connect(netns: Arc<File>, port: u16) -> io::Result<TcpStream> {
    let (answer, made) = oneshot::channel();
    maker()?
        .try_send(Job { netns, answer })
        .map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
    let fd = made
        .await
        .map_err(|_| io::Error::other("the thread that makes sockets ended"))??;
    let socket = TcpSocket::from_std_stream(StdTcpStream::from(fd));
    socket.set_nodelay(true)?;
    socket.connect(SocketAddr::from((GUEST_IP, port))).await
}

fn maker() -> io::Result<&'static SyncSender<Job>> {
    static MAKER: OnceLock<SyncSender<Job>> = OnceLock::new();
    if let Some(jobs) = MAKER.get() {
        return Ok(jobs);
    }
    let (jobs, queue) = sync_channel(QUEUE);
    let home = namespace::current()?;
    std::thread::Builder::new()
        .name("slot-sockets".to_owned())
        .spawn(move || make_sockets(&home, &queue))?;
    // Of two that start it at the same time one thread wins; the other's queue closes, and it ends.
    Ok(MAKER.get_or_init(|| jobs))
}

fn make_sockets(home: &File, queue: &Receiver<Job>) {
    for Job { netns, answer } in queue {
        let made = namespace::enter(&netns).and_then(|()| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            Ok(socket(AddressFamily::Inet, SockType::Stream, flags, None)?)
        });
        if let Err(error) = namespace::enter(home) {
            tracing::error!(%error, "socket thread cannot go home, a slot stays in use");
        }
        // The caller may have given up; the socket then closes.
        let _ = answer.send(made);
    }
}
