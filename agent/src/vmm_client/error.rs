//! Why a VMM did not do what it was asked.

use std::path::PathBuf;
use std::time::Duration;

use torpor_api::vmm::VmmError;
use torpor_ipc::IpcError;

use super::connection::MAX_PENDING;

/// Why a VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmClientError {
    /// Nobody listens at the socket.
    #[error("cannot connect to the VMM at {}", path.display())]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: IpcError,
    },
    /// The socket could not be given to the event loop.
    #[error("cannot watch the control socket")]
    Watch {
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The request could not be written.
    #[error("cannot send {method} to the VMM")]
    Send {
        /// What was asked.
        method: &'static str,
        /// Why not.
        #[source]
        source: IpcError,
    },
    /// The request could not be encoded.
    #[error("cannot encode {method}")]
    Encode {
        /// What was asked.
        method: &'static str,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The connection ended before the reply.
    #[error("the VMM is gone, {method} was not answered")]
    Gone {
        /// What was asked.
        method: &'static str,
    },
    /// No reply in [`REPLY_DEADLINE`].
    #[error("the VMM did not answer {method} in {after:?}")]
    TimedOut {
        /// What was asked.
        method: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// Too many requests wait already.
    #[error("{method} refused: {MAX_PENDING} requests wait for the VMM")]
    Busy {
        /// What was asked.
        method: &'static str,
    },
    /// The VMM said no.
    #[error("the VMM refused {method}")]
    Refused {
        /// What was asked.
        method: &'static str,
        /// Its answer.
        #[source]
        source: VmmError,
    },
    /// A reply of another kind than the request's.
    #[error("the VMM answered {method} with {reply}")]
    UnexpectedReply {
        /// What was asked.
        method: &'static str,
        /// What came.
        reply: String,
    },
}
