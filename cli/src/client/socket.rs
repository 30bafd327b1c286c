//! A WebSocket to torpord.

use super::{CallError, Client, Endpoint, has_port};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use http::{Request, StatusCode, header};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};
use torpor_api::ApiError;

trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

type Socket = WebSocketStream<Box<dyn Connection>>;

/// The way to torpord.
pub(crate) struct Outgoing(SplitSink<Socket, Message>);

/// The way from it.
pub(crate) struct Incoming {
    messages: SplitStream<Socket>,
    at: String,
}

impl Outgoing {
    /// Sends a text or binary message. One that nobody takes any more is lost; the other way says why.
    pub(crate) async fn send(&mut self, message: Message) -> bool {
        self.0.send(message).await.is_ok()
    }
}

impl Incoming {
    /// The next text or binary message; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Message>, CallError> {
        loop {
            return match self.messages.next().await {
                None | Some(Ok(Message::Close(_))) => Ok(None),
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => Ok(Some(message)),
                Some(Ok(_)) => continue,
                Some(Err(source)) => Err(CallError::SocketBroke {
                    at: self.at.clone(),
                    source: Box::new(source),
                }),
            };
        }
    }
}

impl Client {
    /// Opens a WebSocket.
    pub(crate) async fn socket(&self, path: &str) -> Result<(Outgoing, Incoming), CallError> {
        let unreachable = |source| CallError::Unreachable {
            at: self.at(),
            source,
        };
        let (stream, host): (Box<dyn Connection>, &str) = match &self.endpoint {
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(unreachable)?;
                (Box::new(stream), "localhost")
            }
            Endpoint::Tcp { authority } if has_port(authority) => {
                let stream = TcpStream::connect(authority).await.map_err(unreachable)?;
                (Box::new(stream), authority)
            }
            Endpoint::Tcp { authority } => {
                let stream = TcpStream::connect((authority.as_str(), 80)).await;
                (Box::new(stream.map_err(unreachable)?), authority)
            }
        };
        let mut request = Request::builder()
            .uri(format!("ws://{host}{path}"))
            .header(header::HOST, host)
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(
                header::SEC_WEBSOCKET_KEY,
                tungstenite::handshake::client::generate_key(),
            );
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(()).map_err(CallError::BadRequest)?;
        let (socket, _) = tokio_tungstenite::client_async(request, stream)
            .await
            .map_err(|error| self.no_socket(error))?;
        let (outgoing, messages) = socket.split();
        let incoming = Incoming {
            messages,
            at: self.at(),
        };
        Ok((Outgoing(outgoing), incoming))
    }

    /// What torpord says instead of opening one.
    fn no_socket(&self, error: tungstenite::Error) -> CallError {
        match error {
            tungstenite::Error::Http(response) => {
                let (status, body) = (response.status(), response.into_body().unwrap_or_default());
                match serde_json::from_slice::<ApiError>(&body) {
                    Ok(refused) => CallError::Api(refused),
                    Err(_) => self.not_torpord(
                        StatusCode::from_u16(status.as_u16()).unwrap_or_default(),
                        &body.into(),
                    ),
                }
            }
            source => CallError::SocketBroke {
                at: self.at(),
                source: Box::new(source),
            },
        }
    }
}
