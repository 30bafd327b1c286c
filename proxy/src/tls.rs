//! TLS with the operator's certificate.
//!
//! The files are looked at again at a handshake, at most once a second, and read when they have changed, so a renewed
//! certificate serves the next connection and those under way go on. Files that cannot be read or do not belong
//! together change nothing. Clients may choose HTTP/2 or HTTP/1.1.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use std::{fmt, io};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject as _};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig, crypto::ring};
use tokio_rustls::server::TlsStream;

const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or is no PEM.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: pem::Error,
    },
    /// Certificate and key do not fit.
    #[error("certificate {} and key {} cannot be used", certificate.display(), key.display())]
    Unfit {
        /// The chain.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
}

/// A certificate chain and its key, read again when the files change.
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    current: Mutex<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    stamp: Stamp,
    looked: Instant,
}

/// When the files were last written.
type Stamp = [Option<SystemTime>; 2];

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls")
            .field("certificate", &self.certificate)
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// Read a chain and its key, both PEM.
    ///
    /// # Errors
    /// They cannot be read, or do not fit.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let stamp = stamp(certificate, key);
        Ok(Self {
            current: Mutex::new(Current {
                acceptor: acceptor(certificate, key)?,
                stamp,
                looked: Instant::now(),
            }),
            certificate: certificate.to_owned(),
            key: key.to_owned(),
        })
    }

    /// Read the files again now.
    ///
    /// # Errors
    /// They cannot be used; what was read before stays.
    pub fn reload(&self) -> Result<(), TlsError> {
        let stamp = stamp(&self.certificate, &self.key);
        let acceptor = acceptor(&self.certificate, &self.key)?;
        let mut current = self.current();
        current.acceptor = acceptor;
        current.stamp = stamp;
        tracing::info!(certificate = %self.certificate.display(), "certificate read");
        Ok(())
    }

    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        if self.has_changed()
            && let Err(error) = self.reload()
        {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::error!(%error, source, "the new certificate is not used");
        }
        let acceptor = self.current().acceptor.clone();
        acceptor.accept(stream).await
    }

    fn has_changed(&self) -> bool {
        let mut current = self.current();
        if current.looked.elapsed() < LOOK_AGAIN {
            return false;
        }
        current.looked = Instant::now();
        let stamp = stamp(&self.certificate, &self.key);
        // Files that cannot be used are not tried again before they change again.
        std::mem::replace(&mut current.stamp, stamp) != stamp
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stamp(certificate: &Path, key: &Path) -> Stamp {
    [certificate, key].map(|path| {
        std::fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    })
}

fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, TlsError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::Read { path, source }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate)
        .map_err(unreadable(certificate))?
        .collect();
    let chain = chain.map_err(unreadable(certificate))?;
    let secret = PrivateKeyDer::from_pem_file(key).map_err(unreadable(key))?;
    let unfit = |source| TlsError::Unfit {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        source,
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unfit)?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(unfit)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
