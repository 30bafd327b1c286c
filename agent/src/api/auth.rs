//! The bearer token of the TCP listener.

use super::error::Failure;
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use torpor_api::ErrorCode;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read the token file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file has nothing in it: anybody would be let in.
    #[error("the token file {} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// The token, as a digest: comparing digests takes the same time whatever was sent.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// The token in this file, without surrounding white space.
    ///
    /// # Errors
    /// There is none.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let text = std::fs::read_to_string(path).map_err(|source| TokenError::Read {
            path: path.to_owned(),
            source,
        })?;
        let text = text.trim();
        if text.is_empty() {
            return Err(TokenError::Empty {
                path: path.to_owned(),
            });
        }
        Ok(Self(digest(text.as_bytes())))
    }

    /// This text as a token.
    #[must_use]
    pub fn of(text: &str) -> Self {
        Self(digest(text.as_bytes()))
    }

    /// Whether this is what was sent.
    #[must_use]
    pub fn is(&self, sent: &[u8]) -> bool {
        let sent = digest(sent);
        let differing = self
            .0
            .iter()
            .zip(sent)
            .fold(0u8, |differing, (ours, theirs)| differing | (ours ^ theirs));
        std::hint::black_box(differing) == 0
    }
}

fn digest(text: &[u8]) -> [u8; 32] {
    Sha256::digest(text).into()
}

/// A token, and the paths that need none.
#[derive(Clone)]
pub(super) struct Lock {
    pub(super) token: Token,
    pub(super) open: &'static [&'static str],
}

pub(super) async fn require(State(lock): State<Lock>, request: Request, next: Next) -> Response {
    if lock.open.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let sent = request
        .headers()
        .get(header::AUTHORIZATION)
        .map(|value| value.as_bytes());
    match sent.and_then(|value| value.strip_prefix(b"Bearer ")) {
        Some(sent) if lock.token.is(sent) => next.run(request).await,
        Some(_) | None => {
            Failure::new(ErrorCode::Unauthorized, "no valid bearer token was sent").into_response()
        }
    }
}
