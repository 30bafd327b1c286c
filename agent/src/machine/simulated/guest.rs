//! The agent of a simulated guest: it runs programs that are functions, and knows nothing else.

use crate::guest_client::GuestClientError;
use crate::guest_client::channel::{Channel, Dial};
use async_trait::async_trait;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use torpor_api::guest::{Attached, FrameType, GuestError, GuestErrorCode, GuestRequest, GuestResponse};

/// What becomes of a program.
pub(super) enum Ran {
    /// It prints this.
    Printed(String),
    /// It does not start.
    Refused(String),
    /// The guest stands still: the program is not begun yet.
    NotYet,
    /// The execution is over.
    Never,
}

type Execute = dyn Fn(&[String]) -> Ran + Send + Sync;

/// The way to a simulated agent.
pub(super) struct SimulatedGuest(Arc<Execute>);

impl SimulatedGuest {
    pub(super) fn new(execute: impl Fn(&[String]) -> Ran + Send + Sync + 'static) -> Self {
        Self(Arc::new(execute))
    }
}

#[async_trait]
impl Dial for SimulatedGuest {
    async fn dial(&self) -> Result<Channel, GuestClientError> {
        let (ours, theirs) = UnixStream::pair().map_err(|source| GuestClientError::Io {
            operation: "connect to",
            source,
        })?;
        let execute = Arc::clone(&self.0);
        // A client that goes away ends it, and so does the end of the execution.
        tokio::spawn(async move { serve(Channel::over(theirs), &*execute).await });
        Ok(Channel::over(ours))
    }
}

/// The way to a real agent, for as long as an execution lasts.
pub(super) struct RealAgent {
    pub(super) agent: PathBuf,
    pub(super) ended: CancellationToken,
}

#[async_trait]
impl Dial for RealAgent {
    async fn dial(&self) -> Result<Channel, GuestClientError> {
        let failed = |source| GuestClientError::Io {
            operation: "connect to",
            source,
        };
        let (ours, mut theirs) = UnixStream::pair().map_err(failed)?;
        let mut agent = UnixStream::connect(&self.agent).await.map_err(failed)?;
        let ended = self.ended.clone();
        tokio::spawn(async move {
            let copied = tokio::io::copy_bidirectional(&mut theirs, &mut agent);
            ended.run_until_cancelled(copied).await
        });
        Ok(Channel::over(ours))
    }
}

async fn serve(mut channel: Channel, execute: &Execute) -> Result<(), GuestClientError> {
    let request = channel.receiver.next().await?;
    let refuse = |code, message: &str| GuestError {
        code,
        message: message.to_owned(),
    };
    let Ok(GuestRequest::Exec(spec)) = serde_json::from_slice(&request.payload) else {
        let error = refuse(GuestErrorCode::BadRequest, "a simulated guest runs programs only");
        return send(&mut channel, FrameType::Error, &error).await;
    };
    let printed = loop {
        match execute(&spec.argv) {
            Ran::Printed(printed) => break printed,
            Ran::Refused(message) => {
                let error = refuse(GuestErrorCode::ExecFailed, &message);
                return send(&mut channel, FrameType::Error, &error).await;
            }
            Ran::NotYet => tokio::time::sleep(Duration::from_millis(1)).await,
            Ran::Never => return Ok(()),
        }
    };
    let attached = Attached {
        pid: 2,
        serial: 1,
        offset: 0,
        input_offset: 0,
        input_ended: false,
    };
    send(&mut channel, FrameType::Attached, &attached).await?;
    channel.sender.send(FrameType::Stdout, printed.as_bytes()).await?;
    let end = GuestResponse::Exited {
        pid: 2,
        code: Some(0),
        timed_out: false,
    };
    send(&mut channel, FrameType::Response, &end).await
}

async fn send(
    channel: &mut Channel,
    kind: FrameType,
    value: &(impl serde::Serialize + Sync),
) -> Result<(), GuestClientError> {
    let json = serde_json::to_vec(value).unwrap_or_default();
    channel.sender.send(kind, &json).await
}
