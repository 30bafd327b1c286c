//! One client: its login, and the channels that it opens.
//!
//! The login is decided at once and wakes nothing. A channel's confirmation is held back until the machine is
//! awake; after it, requests on the channel are answered here without waiting, and carried out by the channel's
//! own task.

use crate::backend::{Credential, Denied, Guest, Login, LoginAttempt, PublicKey, Refusal};
use crate::gateway::Shared;
use crate::keys::fingerprint;
use crate::login::LoginName;
use crate::{forward, session};
use russh::keys::Certificate;
use russh::server::{Auth, ChannelOpenHandle, Handler, Msg, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, Pty};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Most channels of one client at a time.
const MAX_CHANNELS: usize = 64;

/// A client, as russh tells of it.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    client: SocketAddr,
    logged_in: CancellationToken,
    login: Option<Login>,
    started: HashSet<ChannelId>,
    channels: Arc<Semaphore>,
    over: CancellationToken,
    _ends_channels: DropGuard,
}

impl Connection {
    pub(crate) fn new(shared: Arc<Shared>, client: SocketAddr, logged_in: CancellationToken) -> Self {
        let over = CancellationToken::new();
        Self {
            shared,
            client,
            logged_in,
            login: None,
            started: HashSet::new(),
            channels: Arc::new(Semaphore::new(MAX_CHANNELS)),
            _ends_channels: over.clone().drop_guard(),
            over,
        }
    }

    /// Try a credential; an API key in the user name outranks whatever else is shown.
    async fn try_name(&self, text: &str, shown: Option<Credential<'_>>) -> Option<Login> {
        let name = LoginName::parse(text)?;
        let credential = match name.api_key {
            Some(key) => Credential::ApiKey(key),
            None => shown?,
        };
        self.try_login(LoginAttempt {
            machine: name.machine,
            user: name.user,
            credential,
            client: self.client,
        })
        .await
    }

    async fn try_login(&self, attempt: LoginAttempt<'_>) -> Option<Login> {
        let (machine, address) = (attempt.machine, self.client.ip());
        if !self.shared.limiter.allows(address, machine) {
            tracing::debug!(client = %self.client, "SSH login refused: too many failures");
            return None;
        }
        match self.shared.backend.log_in(attempt).await {
            Ok(login) => Some(login),
            Err(Denied::Unknown) => {
                self.shared.limiter.failed(address, machine);
                None
            }
            Err(error @ (Denied::Asleep | Denied::Failed(_))) => {
                tracing::info!(client = %self.client, %error, "SSH login refused");
                None
            }
        }
    }

    fn enter(&mut self, login: Option<Login>) -> Auth {
        let Some(login) = login else {
            return Auth::reject();
        };
        tracing::info!(machine_id = %login.machine, client = %self.client, by = login.by, user = login.user, "SSH login");
        self.login = Some(login);
        self.logged_in.cancel();
        Auth::Accept
    }

    /// Runs `work` with the awake machine, after `reply` has confirmed the channel.
    fn open<F, W>(&self, reply: ChannelOpenHandle, prepare: F)
    where
        F: FnOnce(Arc<dyn Guest>, Login) -> W + Send + 'static,
        W: Future<Output = Result<Work, Refusal>> + Send + 'static,
    {
        let (Some(login), Ok(slot)) = (self.login.clone(), Arc::clone(&self.channels).try_acquire_owned())
        else {
            // Dropping the reply refuses the channel.
            return;
        };
        let shared = Arc::clone(&self.shared);
        let over = self.over.clone();
        self.shared.tasks.spawn(async move {
            let work = over.run_until_cancelled(open_channel(shared, login, reply, prepare));
            if let Some(Some(work)) = work.await {
                over.run_until_cancelled(work).await;
            }
            drop(slot);
        });
    }

    fn answer_start(&mut self, id: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        if self.started.insert(id) {
            session.channel_success(id)
        } else {
            session.channel_failure(id)
        }
    }
}

/// What a channel does once it is open.
pub(crate) type Work = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

async fn open_channel<F, W>(
    shared: Arc<Shared>,
    login: Login,
    reply: ChannelOpenHandle,
    prepare: F,
) -> Option<Work>
where
    F: FnOnce(Arc<dyn Guest>, Login) -> W,
    W: Future<Output = Result<Work, Refusal>>,
{
    let prepared = match shared.backend.wake(&login).await {
        Ok(guest) => prepare(guest, login.clone()).await,
        Err(refusal) => Err(refusal),
    };
    match prepared {
        Ok(work) => {
            reply.accept().await;
            Some(work)
        }
        Err(refusal) => {
            tracing::info!(machine_id = %login.machine, client = %login.client, %refusal, "SSH channel refused");
            reply
                .reject(ChannelOpenFailure::Other {
                    code: CONNECT_FAILED,
                    reason: refusal.to_string(),
                })
                .await;
            None
        }
    }
}

/// SSH_OPEN_CONNECT_FAILED of RFC 4254.
const CONNECT_FAILED: u32 = 2;

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_none(&mut self, user: &str) -> Result<Auth, russh::Error> {
        // Only a name that carries its credential can enter without another.
        let login = self.try_name(user, None).await;
        Ok(self.enter(login))
    }

    async fn auth_password(&mut self, user: &str, password: &str) -> Result<Auth, russh::Error> {
        let login = self.try_name(user, Some(Credential::Password(password))).await;
        Ok(self.enter(login))
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, russh::Error> {
        let key = PublicKey {
            fingerprint: fingerprint(key.public_key),
        };
        let login = self.try_name(user, Some(Credential::PublicKey(&key))).await;
        Ok(self.enter(login))
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Result<Auth, russh::Error> {
        let claims = match self.shared.authority.check(certificate, user) {
            Ok(claims) => claims,
            Err(error) => {
                tracing::debug!(client = %self.client, %error, "SSH certificate refused");
                return Ok(Auth::reject());
            }
        };
        let attempt = LoginAttempt {
            machine: &claims.machine,
            user: Some(&claims.user),
            credential: Credential::Certificate(&claims),
            client: self.client,
        };
        let login = self.try_login(attempt).await;
        Ok(self.enter(login))
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        let handle = session.handle();
        self.open(reply, move |guest, _| async move {
            Ok(Box::pin(session::run(channel, handle, guest)) as Work)
        });
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host_to_connect: &str,
        port_to_connect: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), russh::Error> {
        let (host, port) = (host_to_connect.to_owned(), u16::try_from(port_to_connect));
        let Ok(port) = port else {
            return Ok(());
        };
        self.open(reply, move |guest, _| async move {
            let stream = guest.connect(&host, port).await?;
            Ok(Box::pin(forward::run(channel, stream)) as Work)
        });
        Ok(())
    }

    async fn channel_close(&mut self, id: ChannelId, _: &mut Session) -> Result<(), russh::Error> {
        self.started.remove(&id);
        Ok(())
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        _: &str,
        _: u32,
        _: u32,
        _: u32,
        _: u32,
        _: &[(Pty, u32)],
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        session.channel_success(id)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        name: &str,
        value: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        if session::takes_variable(name, value) {
            session.channel_success(id)
        } else {
            session.channel_failure(id)
        }
    }

    async fn window_change_request(
        &mut self,
        id: ChannelId,
        _: u32,
        _: u32,
        _: u32,
        _: u32,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        session.channel_success(id)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), russh::Error> {
        self.answer_start(id, session)
    }

    async fn exec_request(
        &mut self,
        id: ChannelId,
        _: &[u8],
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        self.answer_start(id, session)
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut Session,
    ) -> Result<(), russh::Error> {
        if name == session::SFTP {
            self.answer_start(id, session)
        } else {
            session.channel_failure(id)
        }
    }
}
