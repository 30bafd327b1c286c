//! The gateway's way to machines: [`torpor_ssh::Backend`] over the [`Fleet`].
//!
//! A login is checked against the store and wakes nothing; a machine that is asleep and may not be woken by SSH
//! is not entered at all. Once inside, everything goes through the fleet's own way into guests, which wakes by
//! the SSH switch and outlives pauses.

use super::guest::LoggedIn;
use super::refusal;
use crate::api::Token;
use crate::machine::error::{MachineError, chain};
use crate::machine::fleet::{Fleet, WakeSource};
use crate::store::SshProof;
use async_trait::async_trait;
use serde_json::json;
use std::sync::Arc;
use torpor_api::{ErrorCode, MachineId};
use torpor_ssh::{Backend, Credential, Denied, Guest, Login, LoginAttempt, Refusal};

/// User in the guest, if the client names none.
const DEFAULT_USER: &str = "root";

/// The fleet as the gateway sees it.
pub struct FleetBackend {
    fleet: Fleet,
    token: Option<Token>,
}

impl FleetBackend {
    /// The fleet, and the token that opens every machine.
    #[must_use]
    pub fn new(fleet: Fleet, token: Option<Token>) -> Self {
        Self { fleet, token }
    }

    fn is_token(&self, text: &str) -> bool {
        self.token.as_ref().is_some_and(|token| token.is(text.as_bytes()))
    }

    /// How the credential proves that its bearer may enter; `None` if it does not.
    async fn proof(
        &self,
        machine: &MachineId,
        credential: &Credential<'_>,
    ) -> Result<Option<&'static str>, MachineError> {
        let store = self.fleet.store();
        let opens = |proof| store.ssh_proof_opens(machine.clone(), proof);
        Ok(match credential {
            Credential::ApiKey(key) => self.is_token(key).then_some("api_key"),
            Credential::Password(password) if self.is_token(password) => Some("api_key"),
            Credential::Password(password) => {
                let key = store.find_machine_ssh_key(machine.clone()).await?;
                let is_right = key.is_some_and(|key| Token::of(&key.password).is(password.as_bytes()));
                is_right.then_some("password")
            }
            Credential::PublicKey(key) => opens(SshProof::Key(key.fingerprint.clone()))
                .await?
                .then_some("key"),
            Credential::Certificate(claims) => {
                let proof = SshProof::Access {
                    id: claims.access_id.clone(),
                    user: claims.user.clone(),
                    now_unix_ms: self.fleet.now_unix_ms(),
                };
                opens(proof).await?.then_some("certificate")
            }
        })
    }

    async fn enter(&self, attempt: &LoginAttempt<'_>) -> Result<Option<Login>, MachineError> {
        let machine = self.fleet.resolve(attempt.machine).await?;
        let Some(by) = self.proof(&machine, &attempt.credential).await? else {
            return Ok(None);
        };
        self.fleet.check_entry(&machine, WakeSource::Ssh).await?;
        let user = attempt.user.unwrap_or(DEFAULT_USER).to_owned();
        let detail = json!({ "client": attempt.client, "by": by, "user": user });
        self.fleet.record(&machine, "ssh.login", "ssh", detail).await;
        Ok(Some(Login {
            machine,
            user,
            by,
            client: attempt.client,
        }))
    }
}

#[async_trait]
impl Backend for FleetBackend {
    async fn log_in(&self, attempt: LoginAttempt<'_>) -> Result<Login, Denied> {
        match self.enter(&attempt).await {
            Ok(Some(login)) => Ok(login),
            Ok(None) => Err(Denied::Unknown),
            Err(error) => Err(match error.code {
                ErrorCode::MachineNotFound => Denied::Unknown,
                ErrorCode::AutoResumeDisabled => Denied::Asleep,
                _ => Denied::Failed(chain(&error)),
            }),
        }
    }

    async fn wake(&self, login: &Login) -> Result<Arc<dyn Guest>, Refusal> {
        let cause = json!({ "client": login.client, "user": login.user });
        let woken = self.fleet.wake(&login.machine, WakeSource::Ssh, cause).await;
        woken.map(drop).map_err(refusal)?;
        Ok(Arc::new(LoggedIn::new(&self.fleet, login)))
    }
}
