//! The API's two listeners.

use axum::Router;
use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tokio::net::{TcpListener, UnixListener};

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The unix socket cannot be made.
    #[error("cannot listen on {}", path.display())]
    Unix {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The TCP port cannot be bound.
    #[error("cannot listen on {address}")]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// A listener at `path` that only this user can open. A socket that a dead torpord left is replaced.
///
/// # Errors
/// The directory is missing or the path is no socket.
pub fn bind_unix(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Unix {
        path: path.to_owned(),
        source,
    };
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Serve on the unix socket until `ended`.
pub async fn serve_unix(
    listener: UnixListener,
    router: Router,
    ended: impl Future<Output = ()> + Send + 'static,
) {
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(ended).await {
        tracing::error!(%error, "API on the unix socket ended");
    }
}

/// Serve on TCP until `ended`.
///
/// # Errors
/// The address cannot be bound.
pub async fn serve_tcp(
    address: SocketAddr,
    router: Router,
    ended: impl Future<Output = ()> + Send + 'static,
) -> Result<(SocketAddr, tokio::task::JoinHandle<()>), ServeError> {
    let failed = |source| ServeError::Tcp { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((bound, serve_tcp_on(listener, router, ended)))
}

/// Serve on a socket that listens already until `ended`.
pub fn serve_tcp_on(
    listener: TcpListener,
    router: Router,
    ended: impl Future<Output = ()> + Send + 'static,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(ended).await {
            tracing::error!(%error, "API on TCP ended");
        }
    })
}
