//! Processes in the guest: started, joined, listed. What a connection carries is told as [`Frame`]s of
//! [`torpor_api::guest`]; sessions that outlive a connection are [`crate::inside`]'s.

use torpor_api::guest::{AttachSpec, ExecSpec, GuestRequest, GuestResponse, ProcessEntry};

use super::channel::Channel;
use super::{GuestClient, GuestClientError, unexpected};

impl GuestClient {
    /// Start a process and stay with it.
    ///
    /// # Errors
    /// See [`GuestClientError`]; the agent's own refusal is the first frame.
    pub async fn exec(&self, spec: ExecSpec) -> Result<Channel, GuestClientError> {
        self.open("exec", &GuestRequest::Exec(spec)).await
    }

    /// Join a process.
    ///
    /// # Errors
    /// See [`GuestClientError`]; the agent's own refusal is the first frame.
    pub async fn attach(&self, spec: AttachSpec) -> Result<Channel, GuestClientError> {
        self.open("attach", &GuestRequest::Attach(spec)).await
    }

    /// Connect to a TCP port inside the guest; the first frame says whether that worked.
    ///
    /// # Errors
    /// See [`GuestClientError`]; the agent's own refusal is the first frame.
    pub async fn forward(&self, address: std::net::IpAddr, port: u16) -> Result<Channel, GuestClientError> {
        self.open("forward", &GuestRequest::Forward { address, port })
            .await
    }

    /// The processes that execs started: those that run, and the last ones that ended.
    ///
    /// # Errors
    /// See [`GuestClientError`].
    pub async fn processes(&self) -> Result<Vec<ProcessEntry>, GuestClientError> {
        match self.call("list processes", &GuestRequest::Processes).await? {
            GuestResponse::Processes { processes } => Ok(processes),
            other => Err(unexpected("list processes", &other)),
        }
    }
}
