//! One HTTP call to torpord, over its unix socket or over TCP with a bearer token.
//!
//! A connection per call: the command makes one or two. There is no time limit on an answer, since an exec takes
//! as long as its command does.

mod socket;

pub(crate) use socket::{Incoming, Outgoing};

use crate::args::Global;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming as Answer};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::Poll;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use torpor_api::{ApiError, ErrorCode};

/// Why a call brought no answer, or one that can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// torpord said no.
    #[error("{0}")]
    Api(ApiError),
    /// Nobody answers there.
    #[error("cannot reach torpord at {at}")]
    Unreachable {
        at: String,
        #[source]
        source: io::Error,
    },
    /// It broke off.
    #[error("torpord at {at} broke off the call")]
    BrokeOff {
        at: String,
        #[source]
        source: hyper::Error,
    },
    /// A WebSocket broke off, or never came to be.
    #[error("torpord at {at} broke off the connection")]
    SocketBroke {
        at: String,
        #[source]
        source: Box<tokio_tungstenite::tungstenite::Error>,
    },
    /// Whoever answers there is not torpord, or of another version.
    #[error("{at} answered {status}, which is not an answer of torpord: {text}")]
    NotTorpord {
        at: String,
        status: StatusCode,
        text: String,
    },
    /// The address is none.
    #[error("{url:?} is not an address such as http://127.0.0.1:7070")]
    BadUrl { url: String },
    /// The token file can't be read.
    #[error("cannot read the token file {}", path.display())]
    TokenFile {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A token or path that can't be sent.
    #[error("cannot form the request")]
    BadRequest(#[source] http::Error),
}

impl CallError {
    /// What to do about a failure that torpord did not explain itself.
    pub(crate) fn suggested_action(&self) -> &str {
        match self {
            Self::Api(error) => &error.suggested_action,
            Self::Unreachable { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "Run it as root, or use --url with the token of /etc/torpor/token."
            }
            Self::Unreachable { .. } => {
                "Start it with 'systemctl start torpord', or check --socket and --url."
            }
            Self::BrokeOff { .. } | Self::SocketBroke { .. } => "Look at 'journalctl -u torpord'.",
            Self::NotTorpord { .. } => "Check --socket and --url, and that both are of the same version.",
            Self::BadUrl { .. } => "Give the address of torpord's API; https needs a proxy in front of it.",
            Self::TokenFile { .. } => "Check --token-file.",
            Self::BadRequest(_) => "Check the token and the machine's name for odd characters.",
        }
    }

    /// The code that an exec exits with, apart from the usual 125.
    pub(crate) fn exec_exit_code(&self) -> Option<u8> {
        match self {
            Self::Api(error) if error.code == ErrorCode::ExecTimeout => Some(124),
            Self::Api(error) if error.code == ErrorCode::ExecFailed => Some(126),
            _ => None,
        }
    }

    /// Whether torpord knows no such machine.
    pub(crate) fn is_machine_not_found(&self) -> bool {
        matches!(self, Self::Api(error) if error.code == ErrorCode::MachineNotFound)
    }
}

enum Endpoint {
    Unix(PathBuf),
    Tcp { authority: String },
}

/// A body on its way here.
pub(crate) struct Contents<'a> {
    client: &'a Client,
    body: Answer,
}

impl Contents<'_> {
    /// The next bytes; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|source| self.client.broke_off(source))?;
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }
}

type NextPiece = dyn FnMut() -> io::Result<Option<Bytes>> + Send + Sync;

/// A body that is read when the connection has room for it.
struct Pieces(Box<NextPiece>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        Poll::Ready(match (self.0)() {
            Ok(piece) => piece.map(|bytes| Ok(Frame::data(bytes))),
            Err(error) => Some(Err(error)),
        })
    }
}

/// Where torpord is and how to get in.
pub(crate) struct Client {
    endpoint: Endpoint,
    token: Option<String>,
}

impl Client {
    /// As the global options say: the URL if there is one, else the socket.
    pub(crate) fn new(global: &Global) -> Result<Self, CallError> {
        let endpoint = match &global.url {
            None => Endpoint::Unix(global.socket.clone()),
            Some(url) => {
                let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
                let authority = authority.filter(|rest| !rest.is_empty() && !rest.contains(['/', '@', '?']));
                let authority = authority
                    .ok_or_else(|| CallError::BadUrl { url: url.clone() })?
                    .to_owned();
                Endpoint::Tcp { authority }
            }
        };
        let token = match (&global.token, &global.token_file) {
            (Some(token), _) => Some(token.trim().to_owned()),
            (None, Some(path)) => Some(read_token(path)?),
            (None, None) => None,
        };
        Ok(Self { endpoint, token })
    }

    fn at(&self) -> String {
        match &self.endpoint {
            Endpoint::Unix(path) => path.display().to_string(),
            Endpoint::Tcp { authority } => format!("http://{authority}"),
        }
    }

    /// Sends a request without a body; answers with the body of a 2xx.
    pub(crate) async fn call(&self, method: Method, path: &str) -> Result<Bytes, CallError> {
        self.send(method, path, None).await
    }

    /// Sends JSON; answers with the body of a 2xx.
    pub(crate) async fn call_with<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<Bytes, CallError> {
        // The bodies are plain structs of strings and numbers, whose maps have string keys.
        let body = serde_json::to_vec(body).unwrap_or_default();
        self.send(method, path, Some(body)).await
    }

    /// Reads a body as the type it should be.
    pub(crate) fn read<T: DeserializeOwned>(&self, body: &Bytes) -> Result<T, CallError> {
        serde_json::from_slice(body).map_err(|_| self.not_torpord(StatusCode::OK, body))
    }

    /// Sends a request without a body; answers with the body of a 2xx as it comes.
    pub(crate) async fn open(&self, method: Method, path: &str) -> Result<Contents<'_>, CallError> {
        let request = self.request(method, path, None)?.map(Full::boxed);
        let response = self.accepted(self.exchange(request).await?).await?;
        Ok(Contents {
            client: self,
            body: response.into_body(),
        })
    }

    /// Sends a body piece by piece; answers with the body of a 2xx. A piece that can't be read breaks the call off.
    pub(crate) async fn upload(
        &self,
        path: &str,
        pieces: impl FnMut() -> io::Result<Option<Bytes>> + Send + Sync + 'static,
    ) -> Result<Bytes, CallError> {
        let request = self.request(Method::PUT, path, None)?;
        let request = request.map(|_| Pieces(Box::new(pieces)).boxed());
        let response = self.accepted(self.exchange(request).await?).await?;
        self.collect(response).await
    }

    async fn send(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Bytes, CallError> {
        let request = self.request(method, path, body)?.map(Full::boxed);
        let response = self.accepted(self.exchange(request).await?).await?;
        self.collect(response).await
    }

    async fn exchange<B>(&self, request: Request<B>) -> Result<Response<Answer>, CallError>
    where
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let unreachable = |source| CallError::Unreachable {
            at: self.at(),
            source,
        };
        let response = match &self.endpoint {
            Endpoint::Unix(path) => {
                exchange(UnixStream::connect(path).await.map_err(unreachable)?, request).await
            }
            Endpoint::Tcp { authority } => {
                let address = if has_port(authority) {
                    authority.clone()
                } else {
                    format!("{authority}:80")
                };
                exchange(TcpStream::connect(address).await.map_err(unreachable)?, request).await
            }
        };
        response.map_err(|source| self.broke_off(source))
    }

    fn broke_off(&self, source: hyper::Error) -> CallError {
        CallError::BrokeOff {
            at: self.at(),
            source,
        }
    }

    /// A 2xx; anything else is an error.
    async fn accepted(&self, response: Response<Answer>) -> Result<Response<Answer>, CallError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.collect(response).await?;
        match serde_json::from_slice::<ApiError>(&body) {
            Ok(error) => Err(CallError::Api(error)),
            Err(_) => Err(self.not_torpord(status, &body)),
        }
    }

    async fn collect(&self, response: Response<Answer>) -> Result<Bytes, CallError> {
        let body = response.into_body().collect().await;
        Ok(body.map_err(|source| self.broke_off(source))?.to_bytes())
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Request<Full<Bytes>>, CallError> {
        let host = match &self.endpoint {
            Endpoint::Unix(_) => "localhost",
            Endpoint::Tcp { authority } => authority,
        };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        request
            .body(Full::from(body.unwrap_or_default()))
            .map_err(CallError::BadRequest)
    }

    fn not_torpord(&self, status: StatusCode, body: &Bytes) -> CallError {
        let text: String = String::from_utf8_lossy(body)
            .chars()
            .filter(|c| !c.is_control())
            .take(200)
            .collect();
        CallError::NotTorpord {
            at: self.at(),
            status,
            text,
        }
    }
}

fn has_port(authority: &str) -> bool {
    authority
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok())
}

fn read_token(path: &PathBuf) -> Result<String, CallError> {
    let text = std::fs::read_to_string(path).map_err(|source| CallError::TokenFile {
        path: path.clone(),
        source,
    })?;
    Ok(text.trim().to_owned())
}

async fn exchange<S, B>(stream: S, request: Request<B>) -> Result<Response<Answer>, hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the connection; its errors reach the request.
    tokio::spawn(connection);
    sender.send_request(request).await
}

/// A path segment of a text that a user gave: whatever it holds, it stays one segment.
pub(crate) fn segment(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_text_stays_one_path_segment() {
        assert_eq!(segment("web-1"), "web-1");
        assert_eq!(segment("../x?y#z"), "%2E%2E%2Fx%3Fy%23z");
    }

    #[test]
    fn every_failure_says_what_to_do() {
        let io = || io::Error::from(io::ErrorKind::NotFound);
        let failures = [
            CallError::Api(ApiError::new(
                ErrorCode::MachineNotFound,
                "machine \"x\" not found",
            )),
            CallError::Unreachable {
                at: "/run/x".to_owned(),
                source: io(),
            },
            CallError::NotTorpord {
                at: "x".to_owned(),
                status: StatusCode::OK,
                text: String::new(),
            },
            CallError::BadUrl {
                url: "ftp://x".to_owned(),
            },
            CallError::TokenFile {
                path: PathBuf::from("/x"),
                source: io(),
            },
        ];
        for failure in failures {
            assert!(
                !failure.to_string().is_empty() && failure.suggested_action().ends_with('.'),
                "{failure:?}"
            );
        }
    }
}
