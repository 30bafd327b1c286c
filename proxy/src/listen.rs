//! The proxy's listeners: one per exposed service, and one that routes by host name.
//!
//! Every listener is one task that accepts, and every connection is one task. [`Proxy::hide`] ends the accepting
//! task and lets connections under way finish. What happens on a connection is `forward`'s job.

use crate::waker::Waker;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use torpor_api::http::ServiceKind;

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
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            listen_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
            head_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(90),
            max_head_bytes: 64 << 10,
            max_connections: 4096,
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
    connections: TaskTracker,
}

struct Listener {
    closing: CancellationToken,
    accepting: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// A proxy that listens on nothing yet.
    #[must_use]
    pub fn new(config: ProxyConfig, waker: Arc<dyn Waker>) -> Self {
        Self {
            config: Arc::new(config),
            waker,
            listeners: Mutex::default(),
            connections: TaskTracker::new(),
        }
    }

    /// Listens for a service on `listen_port`, or on a free port if that is 0, and answers with the port.
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The port is taken.
    pub fn expose(&self, listen_port: u16, kind: ServiceKind) -> Result<u16, ListenError> {
        let listener = bind(SocketAddr::new(self.config.listen_ip, listen_port))?;
        let _ = (listener, kind, &self.waker);
        Ok(listen_port)
    }

    /// Stops listening on a port; answers whether it was exposed. The port is free when this returns.
    /// Connections under way finish; idle keep-alive connections are closed.
    pub async fn hide(&self, listen_port: u16) -> bool {
        let listener = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).remove(&listen_port);
        let Some(listener) = listener else { return false };
        listener.closing.cancel();
        // A panic in the accepting task has closed the listener too.
        let _ = listener.accepting.await;
        true
    }

    /// Listens for HTTP whose `Host` is `<port>-<machine>.<domain>`; answers with the bound address.
    /// Must be called inside a tokio runtime. [`Proxy::hide`] with its port closes it.
    ///
    /// # Errors
    /// The address is taken.
    pub fn serve_host_names(&self, address: SocketAddr, domain: &str) -> Result<SocketAddr, ListenError> {
        let _ = domain;
        bind(address).map(|_| address)
    }

    /// Closes every listener and waits up to `grace` for the connections under way; answers how many were left.
    pub async fn shutdown(&self, grace: Duration) -> usize {
        let _ = grace;
        self.connections.len()
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let bind = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        // The kernel caps it at net.core.somaxconn; a dropped SYN would cost the client a second.
        socket.listen(4096)
    };
    bind().map_err(|source| ListenError::Bind { address, source })
}
