//! The listener: accepts, bounds and ends connections.
//!
//! One task accepts, and one task per client drives its connection; channels have tasks of their own. A client
//! that does not get through its login in time is dropped, and so is one whose other end has gone: an SSH
//! keep-alive asks now and then, which reaches no machine and keeps none awake.

use crate::authority::Authority;
use crate::backend::Backend;
use crate::connection::Connection;
use crate::limiter::Limiter;
use russh::keys::ssh_key::PrivateKey;
use russh::server::{self, Config};
use russh::{Disconnect, MethodKind, MethodSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Longest login, from the first byte.
const LOGIN_TIME: Duration = Duration::from_secs(60);
/// Every refusal takes this long, so that it does not tell which check failed.
const REFUSAL_TIME: Duration = Duration::from_millis(300);
/// A client that has been silent for this long is asked whether it is there …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
/// … and given up after so many questions without an answer.
const KEEPALIVE_MAX: usize = 15;
/// Logins that may fail on one connection: a client may offer many keys.
const MAX_LOGIN_FAILURES: usize = 12;
/// Pause after an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the gateway does not listen.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The address cannot be bound.
    #[error("cannot listen for SSH on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// What a gateway needs.
pub struct GatewayConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The key that clients remember.
    pub host_key: PrivateKey,
    /// Whose certificates are taken.
    pub authority: Arc<Authority>,
    /// Most clients at a time.
    pub max_connections: usize,
}

/// A listener and its clients.
pub struct Gateway {
    address: SocketAddr,
    ended: CancellationToken,
    tasks: TaskTracker,
}

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) limiter: Limiter,
    pub(crate) tasks: TaskTracker,
}

impl Gateway {
    /// Listen, and serve until [`Gateway::shutdown`].
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn start(config: GatewayConfig, backend: Arc<dyn Backend>) -> Result<Self, GatewayError> {
        let failed = |source| GatewayError::Bind {
            address: config.listen,
            source,
        };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        Self::start_on(listener, config, backend)
    }

    /// Serve on a socket that listens already, until [`Gateway::shutdown`].
    ///
    /// # Errors
    /// The socket has no address.
    pub fn start_on(
        listener: TcpListener,
        config: GatewayConfig,
        backend: Arc<dyn Backend>,
    ) -> Result<Self, GatewayError> {
        let failed = |source| GatewayError::Bind {
            address: config.listen,
            source,
        };
        let address = listener.local_addr().map_err(failed)?;
        let (ended, tasks) = (CancellationToken::new(), TaskTracker::new());
        let acceptor = Acceptor {
            ssh: Arc::new(ssh_config(config.host_key)),
            slots: Arc::new(Semaphore::new(config.max_connections)),
            shared: Arc::new(Shared {
                backend,
                authority: config.authority,
                limiter: Limiter::default(),
                tasks: tasks.clone(),
            }),
            ended: ended.clone(),
        };
        tasks.spawn(acceptor.run(listener));
        Ok(Self {
            address,
            ended,
            tasks,
        })
    }

    /// The address that was bound.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accept no more, tell every client, and wait for them for at most `grace`.
    pub async fn shutdown(&self, grace: Duration) {
        self.ended.cancel();
        self.tasks.close();
        // Who has not left by then is cut off with the process.
        let _ = tokio::time::timeout(grace, self.tasks.wait()).await;
    }
}

fn ssh_config(host_key: PrivateKey) -> Config {
    let methods = [MethodKind::None, MethodKind::PublicKey, MethodKind::Password];
    Config {
        server_id: russh::SshId::Standard(concat!("SSH-2.0-Torpor_", env!("CARGO_PKG_VERSION")).into()),
        methods: MethodSet::from(methods.as_slice()),
        auth_rejection_time: REFUSAL_TIME,
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key],
        max_auth_attempts: MAX_LOGIN_FAILURES,
        inactivity_timeout: None,
        keepalive_interval: Some(KEEPALIVE_INTERVAL),
        keepalive_max: KEEPALIVE_MAX,
        nodelay: true,
        ..Config::default()
    }
}

struct Acceptor {
    ssh: Arc<Config>,
    slots: Arc<Semaphore>,
    shared: Arc<Shared>,
    ended: CancellationToken,
}

impl Acceptor {
    async fn run(self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.ended.cancelled() => return,
            };
            match accepted {
                Ok((stream, client)) => self.take(stream, client),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an SSH connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn take(&self, stream: TcpStream, client: SocketAddr) {
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            tracing::warn!(%client, "too many SSH connections, one was refused");
            return;
        };
        let (ssh, shared, ended) = (
            Arc::clone(&self.ssh),
            Arc::clone(&self.shared),
            self.ended.clone(),
        );
        self.shared.tasks.spawn(async move {
            if let Err(error) = serve(ssh, stream, client, shared, ended).await {
                tracing::debug!(%client, %error, "SSH connection ended");
            }
            drop(slot);
        });
    }
}

async fn serve(
    ssh: Arc<Config>,
    stream: TcpStream,
    client: SocketAddr,
    shared: Arc<Shared>,
    ended: CancellationToken,
) -> Result<(), russh::Error> {
    stream.set_nodelay(true).map_err(russh::Error::IO)?;
    let logged_in = CancellationToken::new();
    let connection = Connection::new(shared, client, logged_in.clone());
    let deadline = tokio::time::Instant::now() + LOGIN_TIME;
    let started = tokio::time::timeout_at(deadline, server::run_stream(ssh, stream, connection)).await;
    let mut session = started.map_err(|_| russh::Error::ConnectionTimeout)??;
    let handle = session.handle();
    let too_late = async {
        if tokio::time::timeout_at(deadline, logged_in.cancelled())
            .await
            .is_ok()
        {
            std::future::pending::<()>().await;
        }
    };
    let reason = tokio::select! {
        outcome = &mut session => return outcome,
        () = too_late => "the login took too long",
        () = ended.cancelled() => "torpord is restarting",
    };
    // The connection may be stuck: then it is left to its own end.
    let _ = handle
        .disconnect(Disconnect::ByApplication, reason.to_owned(), String::new())
        .await;
    session.await
}
