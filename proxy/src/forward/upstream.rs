//! Connections to guests, and the rule that a request is sent at most once.
//!
//! A [`Link`] is one HTTP/1.1 connection to one execution. Its task ends with the execution, so nothing waits for
//! a guest that is gone.

use crate::meter::RequestBody;
use crate::waker::Target;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use torpor_api::ExecutionId;

/// Most header fields of a message, either way.
pub(crate) const MAX_HEADERS: usize = 256;

/// A connection to a guest, free for the next request.
pub(crate) struct Link {
    pub(crate) target: Target,
    pub(crate) execution: ExecutionId,
    sender: SendRequest<RequestBody>,
}

/// What became of a request that was to be sent.
pub(crate) enum SendError {
    /// Not a byte of it was sent: it may be sent elsewhere.
    Unsent(Box<Request<RequestBody>>),
    /// It was sent, wholly or in part, and must not be sent again.
    Sent(hyper::Error),
}

impl Link {
    /// Speaks HTTP/1.1 on a fresh stream until it closes or the execution is over.
    pub(crate) async fn open(
        stream: TcpStream,
        target: Target,
        execution: ExecutionId,
        over: CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<Self, hyper::Error> {
        // Without it a small request waits for the guest's delayed ACK; a socket that refuses is closed already.
        let _ = stream.set_nodelay(true);
        let (sender, connection) = http1::Builder::new()
            .preserve_header_case(true)
            .max_headers(MAX_HEADERS)
            .handshake(TokioIo::new(stream))
            .await?;
        tasks.spawn(async move {
            tokio::select! {
                // Its errors reach whoever waits for the response.
                _ = connection.with_upgrades() => {}
                () = over.cancelled() => {}
            }
        });
        Ok(Self {
            target,
            execution,
            sender,
        })
    }

    /// Whether the guest has closed it already.
    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends the request, once, and waits for the head of its response.
    pub(crate) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, SendError> {
        if self.sender.ready().await.is_err() {
            return Err(SendError::Unsent(Box::new(request)));
        }
        self.sender
            .try_send_request(request)
            .await
            .map_err(|mut failure| match failure.take_message() {
                Some(request) => SendError::Unsent(Box::new(request)),
                None => SendError::Sent(failure.into_error()),
            })
    }
}
