//! The proxy's listeners: one per exposed service, and one that routes by host name.
//!
//! Every listener is one task that accepts, and every connection is one task. [`Proxy::hide`] ends the accepting
//! task and lets connections under way finish. What happens on a connection is `forward`'s job.
//!
//! Somebody else may hold a copy of a listening socket ([`Sockets`]), so that it goes on taking connections while this
//! process is replaced. Hiding a service therefore ends the socket itself; a shutdown only stops accepting.

use crate::forward::{From, LAST_WORDS, Permit, Privacy, Shared, serve_http, serve_tcp};
use crate::respond;
use crate::route::Route;
use crate::tls::Tls;
use crate::waker::{WakeRefusal, Waker};
use socket2::{SockRef, TcpKeepalive};
use std::collections::HashMap;
use std::fmt::Debug;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use torpor_api::ErrorCode;
use torpor_api::http::ServiceKind;

/// Clients that are being told at a time that there is no room.
const MAX_OVERFLOW: usize = 256;
const OVERFLOW_PATIENCE: Duration = Duration::from_secs(2);
const MAX_OVERFLOW_READ_BYTES: u64 = 64 << 10;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A client that is gone without a word is noticed after two minutes; keep-alives count as nothing.
const KEEPALIVE_TIME: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// First byte of a TLS connection.
const TLS_HANDSHAKE: u8 = 22;

/// Where listening sockets come from.
pub trait Sockets: Debug + Send + Sync {
    /// A socket that listens at this address; port 0 stands for any that is free.
    ///
    /// # Errors
    /// The address is taken or not this host's.
    fn listen(&self, address: SocketAddr) -> io::Result<std::net::TcpListener>;
}

/// Sockets of this process alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct OwnSockets;

impl Sockets for OwnSockets {
    fn listen(&self, address: SocketAddr) -> io::Result<std::net::TcpListener> {
        let family = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(family, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        // The kernel caps it at net.core.somaxconn; a dropped SYN would cost the client a second.
        socket.listen(4096)?;
        Ok(socket.into())
    }
}

/// Bounds and addresses of a proxy.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Address on which services are exposed.
    pub listen_ip: IpAddr,
    /// Longest time between the first byte of a request's head and its last.
    pub head_timeout: Duration,
    /// How long a connection may wait for its first or next request.
    pub idle_timeout: Duration,
    /// Most bytes of a request's head; more is answered with 431.
    pub max_head_bytes: usize,
    /// Most connections of one listener at a time; more are answered with 503 `capacity_exceeded`.
    pub max_connections: usize,
    /// With it every HTTP listener takes TLS, too.
    pub tls: Option<Arc<Tls>>,
    /// Where its listening sockets come from.
    pub sockets: Arc<dyn Sockets>,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            listen_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            head_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(90),
            max_head_bytes: 64 << 10,
            max_connections: 4096,
            tls: None,
            sockets: Arc::new(OwnSockets),
        }
    }
}

/// A listener could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address is taken or not this host's.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address that was wanted.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The listeners and what they need. Dropping it closes every listener; connections under way go on.
pub struct Proxy {
    config: Arc<ProxyConfig>,
    waker: Arc<dyn Waker>,
    listeners: Mutex<HashMap<u16, Listener>>,
    tasks: TaskTracker,
}

struct Listener {
    closing: CancellationToken,
    accepting: JoinHandle<TcpListener>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

impl Proxy {
    /// A proxy that listens on nothing yet.
    #[must_use]
    pub fn new(config: ProxyConfig, waker: Arc<dyn Waker>) -> Self {
        Self {
            config: Arc::new(config),
            waker,
            listeners: Mutex::default(),
            tasks: TaskTracker::new(),
        }
    }

    /// Listens for a service on `listen_port`, or on a free port if that is 0, and answers with the port.
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The port is taken.
    pub fn expose(&self, listen_port: u16, kind: ServiceKind) -> Result<u16, ListenError> {
        let (listener, address) = self.bind(SocketAddr::new(self.config.listen_ip, listen_port))?;
        let listen_port = address.port();
        let entrance = Entrance::PlainOrTls;
        self.listen(
            listener,
            listen_port,
            kind,
            Route::Service { listen_port },
            entrance,
        );
        Ok(listen_port)
    }

    /// Listens for HTTP whose `Host` is `<port>-<machine>.<domain>`; answers with the bound address.
    /// Must be called inside a tokio runtime. [`Proxy::hide`] with its port closes it.
    ///
    /// # Errors
    /// The address is taken.
    pub fn serve_host_names(
        &self,
        address: SocketAddr,
        domain: &str,
        entrance: Entrance,
    ) -> Result<SocketAddr, ListenError> {
        let (listener, address) = self.bind(address)?;
        let domain = domain.trim_matches('.').to_ascii_lowercase();
        self.listen(
            listener,
            address.port(),
            ServiceKind::Http,
            Route::HostName { domain },
            entrance,
        );
        Ok(address)
    }

    /// Stops listening on a port; answers whether it was exposed. The port is free when this returns.
    /// Connections under way finish; idle keep-alive connections are closed.
    pub async fn hide(&self, listen_port: u16) -> bool {
        let Some(listener) = self.listeners().remove(&listen_port) else {
            return false;
        };
        if let Some(socket) = listener.close().await {
            // Whoever holds a copy of it keeps nobody waiting. A socket that refuses is closed already.
            let _ = SockRef::from(&socket).shutdown(Shutdown::Both);
        }
        true
    }

    /// Accepts no more and waits up to `grace` for the connections under way; answers how many were left.
    pub async fn shutdown(&self, grace: Duration) -> usize {
        let listeners: Vec<Listener> = self.listeners().drain().map(|(_, listener)| listener).collect();
        for listener in listeners {
            drop(listener.close().await);
        }
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_ok() {
            return 0;
        }
        self.tasks.len()
    }

    fn bind(&self, address: SocketAddr) -> Result<(TcpListener, SocketAddr), ListenError> {
        let bind = || {
            let listener = self.config.sockets.listen(address)?;
            listener.set_nonblocking(true)?;
            let bound = listener.local_addr()?;
            Ok((TcpListener::from_std(listener)?, bound))
        };
        bind().map_err(|source| ListenError::Bind { address, source })
    }

    fn listen(&self, listener: TcpListener, port: u16, kind: ServiceKind, route: Route, entrance: Entrance) {
        let closing = CancellationToken::new();
        let acceptor = Acceptor {
            shared: Arc::new(Shared {
                waker: Arc::clone(&self.waker),
                config: Arc::clone(&self.config),
                route,
                tasks: self.tasks.clone(),
            }),
            kind,
            entrance,
            free: Arc::new(Semaphore::new(self.config.max_connections)),
            overflow: Arc::new(Semaphore::new(MAX_OVERFLOW)),
            closing: closing.clone(),
        };
        let accepting = tokio::spawn(acceptor.run(listener));
        self.listeners().insert(port, Listener { closing, accepting });
    }

    fn listeners(&self) -> MutexGuard<'_, HashMap<u16, Listener>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listener {
    /// Accepts no more; a panic in the accepting task has closed the socket, too.
    async fn close(mut self) -> Option<TcpListener> {
        self.closing.cancel();
        (&mut self.accepting).await.ok()
    }
}

/// Whether a listener takes connections that are not encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entrance {
    /// Both, TLS if there is a certificate; a connection's first byte tells.
    PlainOrTls,
    /// TLS only.
    Tls,
}

struct Acceptor {
    shared: Arc<Shared>,
    kind: ServiceKind,
    entrance: Entrance,
    free: Arc<Semaphore>,
    overflow: Arc<Semaphore>,
    closing: CancellationToken,
}

impl Acceptor {
    async fn run(self, listener: TcpListener) -> TcpListener {
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.closing.cancelled() => return listener,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, client)) => self.take(stream, client),
                Err(error) if is_connections_own(&error) => {}
                Err(error) => {
                    tracing::warn!(error = %error, "cannot accept a connection");
                    // Out of descriptors or memory: accept would fail at once, again and again.
                    tokio::select! {
                        () = self.closing.cancelled() => return listener,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                    }
                }
            }
        }
    }

    fn take(&self, stream: TcpStream, client: SocketAddr) {
        // A socket that refuses is closed already.
        let _ = stream.set_nodelay(true);
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_TIME)
            .with_interval(KEEPALIVE_INTERVAL);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        let shared = Arc::clone(&self.shared);
        let Ok(permit) = Arc::clone(&self.free).try_acquire_owned() else {
            return self.turn_away(stream);
        };
        match self.kind {
            ServiceKind::Http => {
                let entering = enter(
                    shared,
                    stream,
                    client,
                    self.entrance,
                    self.closing.clone(),
                    Arc::new(permit),
                );
                self.shared.tasks.spawn(entering);
            }
            ServiceKind::Tcp => {
                self.shared.tasks.spawn(async move {
                    serve_tcp(shared, stream, client).await;
                    drop(permit);
                });
            }
        }
    }

    /// Tells a client that all connections are taken; when even telling is too much, the connection is reset.
    fn turn_away(&self, stream: TcpStream) {
        let telling = Arc::clone(&self.overflow).try_acquire_owned();
        let (ServiceKind::Http, Ok(permit)) = (self.kind, telling) else {
            // If it fails the close is an ordinary one.
            let _ = stream.set_zero_linger();
            return;
        };
        let message = format!(
            "all {} connections of this listener are taken",
            self.shared.config.max_connections
        );
        self.shared.tasks.spawn(async move {
            let refusal = WakeRefusal::new(ErrorCode::CapacityExceeded, message);
            // A client too slow to be told is cut off.
            let _ = tokio::time::timeout(OVERFLOW_PATIENCE, tell(stream, &refusal)).await;
            drop(permit);
        });
    }
}

/// Finds out what the client speaks, and serves it.
async fn enter(
    shared: Arc<Shared>,
    stream: TcpStream,
    client: SocketAddr,
    entrance: Entrance,
    closing: CancellationToken,
    permit: Permit,
) {
    let from = |privacy| From {
        client,
        permit,
        privacy,
    };
    let Some(tls) = shared.config.tls.clone() else {
        if entrance == Entrance::PlainOrTls {
            serve_http(shared, stream, from(Privacy::Plain), closing).await;
        }
        return;
    };
    let knock = async {
        let mut first = [0];
        stream.peek(&mut first).await?;
        if entrance == Entrance::PlainOrTls && first[0] != TLS_HANDSHAKE {
            return Ok(Entered::Plain(stream));
        }
        Ok::<_, io::Error>(Entered::Tls(Box::new(tls.accept(stream).await?)))
    };
    let entered = tokio::select! {
        entered = tokio::time::timeout(shared.config.head_timeout, knock) => entered,
        () = async { closing.cancelled().await; tokio::time::sleep(LAST_WORDS).await } => return,
    };
    match entered {
        Ok(Ok(Entered::Plain(stream))) => serve_http(shared, stream, from(Privacy::Plain), closing).await,
        Ok(Ok(Entered::Tls(stream))) => serve_http(shared, *stream, from(Privacy::Tls), closing).await,
        Ok(Err(error)) => tracing::debug!(%client, %error, "no TLS handshake"),
        Err(_) => tracing::debug!(%client, "a client said nothing"),
    }
}

enum Entered {
    Plain(TcpStream),
    Tls(Box<tokio_rustls::server::TlsStream<TcpStream>>),
}

/// Writes the refusal and reads what the client sends until it closes: a close with unread bytes would be a reset
/// that takes the answer back.
async fn tell(mut stream: TcpStream, refusal: &WakeRefusal) -> io::Result<()> {
    stream.write_all(&respond::refusal_bytes(refusal)).await?;
    stream.shutdown().await?;
    let mut rest = (&mut stream).take(MAX_OVERFLOW_READ_BYTES);
    tokio::io::copy(&mut rest, &mut tokio::io::sink())
        .await
        .map(|_| ())
}

/// Whether an error of `accept` is about the connection that was to be accepted, not about the listener.
fn is_connections_own(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}
