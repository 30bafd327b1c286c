//! A client of `russh`, in the words of the tests.

use russh::client::{self, Handle, Msg};
use russh::keys::{Certificate, PrivateKey, PrivateKeyWithHashAlg};
use russh::{Channel, ChannelMsg, ChannelStream};
use russh_sftp::client::SftpSession;
use std::net::SocketAddr;
use std::sync::Arc;
use torpor_ssh::KeyPair;

/// A key pair of a client.
pub(super) struct Keys(Arc<PrivateKey>);

impl Keys {
    pub(super) fn new() -> Self {
        Self::of(&KeyPair::generate("test").unwrap().private_key)
    }

    pub(super) fn of(private_key: &str) -> Self {
        Self(Arc::new(PrivateKey::from_openssh(private_key).unwrap()))
    }

    pub(super) fn public_line(&self) -> String {
        self.0.public_key().to_openssh().unwrap()
    }
}

struct Trusting;

impl client::Handler for Trusting {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        _: &russh::keys::PublicKeyOrCertificate,
    ) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

pub(super) struct Client(Handle<Trusting>);

impl Client {
    pub(super) async fn connect(address: SocketAddr) -> Self {
        let config = Arc::new(client::Config::default());
        Self(client::connect(config, address, Trusting).await.unwrap())
    }

    pub(super) async fn with_key(&mut self, user: &str, keys: &Keys) -> bool {
        let key = PrivateKeyWithHashAlg::new(Arc::clone(&keys.0), None);
        self.0.authenticate_publickey(user, key).await.unwrap().success()
    }

    pub(super) async fn with_password(&mut self, user: &str, password: &str) -> bool {
        self.0
            .authenticate_password(user, password)
            .await
            .unwrap()
            .success()
    }

    pub(super) async fn with_certificate(&mut self, user: &str, keys: &Keys, certificate: &str) -> bool {
        let certificate = Certificate::from_openssh(certificate).unwrap();
        self.0
            .authenticate_openssh_cert(user, Arc::clone(&keys.0), certificate)
            .await
            .unwrap()
            .success()
    }

    async fn channel(&self) -> Channel<Msg> {
        self.0.channel_open_session().await.unwrap()
    }

    pub(super) async fn run(&self, line: &str) -> Running {
        let channel = self.channel().await;
        channel.exec(true, line).await.unwrap();
        Running::new(channel)
    }

    pub(super) async fn shell(&self, term: &str, (cols, rows): (u32, u32), env: &[(&str, &str)]) -> Running {
        let channel = self.channel().await;
        for (name, value) in env {
            channel.set_env(true, *name, *value).await.unwrap();
        }
        channel
            .request_pty(true, term, cols, rows, 0, 0, &[])
            .await
            .unwrap();
        channel.request_shell(true).await.unwrap();
        Running::new(channel)
    }

    pub(super) async fn sftp(&self) -> Sftp {
        let channel = self.channel().await;
        channel.request_subsystem(true, "sftp").await.unwrap();
        Sftp(SftpSession::new(channel.into_stream()).await.unwrap())
    }

    pub(super) async fn forward(&self, host: &str, port: u16) -> Option<ChannelStream<Msg>> {
        let opened = self
            .0
            .channel_open_direct_tcpip(host, u32::from(port), "127.0.0.1", 1)
            .await;
        opened.ok().map(Channel::into_stream)
    }
}

/// What a command said and how it ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
    pub(super) code: Option<u32>,
}

impl Answer {
    pub(super) fn of(stdout: &str) -> Self {
        Self {
            stdout: stdout.into(),
            stderr: Vec::new(),
            code: Some(0),
        }
    }
}

pub(super) struct Running {
    channel: Channel<Msg>,
    answer: Answer,
}

impl Running {
    fn new(channel: Channel<Msg>) -> Self {
        Self {
            channel,
            answer: Answer::default(),
        }
    }

    pub(super) async fn send(&self, bytes: &[u8]) {
        self.channel.data(bytes).await.unwrap();
    }

    pub(super) async fn end(&self) {
        self.channel.eof().await.unwrap();
    }

    /// One message; whether there are more.
    async fn take(&mut self) -> bool {
        match self.channel.wait().await {
            Some(ChannelMsg::Data { data }) => {
                assert_eq!(self.answer.code, None, "output after the exit status");
                self.answer.stdout.extend_from_slice(&data);
            }
            Some(ChannelMsg::ExtendedData { data, .. }) => {
                assert_eq!(self.answer.code, None, "output after the exit status");
                self.answer.stderr.extend_from_slice(&data);
            }
            Some(ChannelMsg::ExitStatus { exit_status }) => self.answer.code = Some(exit_status),
            Some(ChannelMsg::Failure) => panic!("a request was refused"),
            None => return false,
            Some(_) => {}
        }
        true
    }

    /// So many bytes of output, which are then forgotten.
    pub(super) async fn read(&mut self, len: usize) -> Vec<u8> {
        while self.answer.stdout.len() < len {
            assert!(self.take().await, "ended early: {:?}", self.answer);
        }
        self.answer.stdout.drain(..len).collect()
    }

    pub(super) async fn line(&mut self) -> Vec<u8> {
        loop {
            if let Some(end) = self.answer.stdout.iter().position(|byte| *byte == b'\n') {
                return self.answer.stdout.drain(..=end).collect();
            }
            assert!(self.take().await, "ended early: {:?}", self.answer);
        }
    }

    pub(super) async fn finish(mut self) -> Answer {
        while self.take().await {}
        self.answer
    }
}

pub(super) struct Sftp(SftpSession);

impl std::ops::Deref for Sftp {
    type Target = SftpSession;
    fn deref(&self) -> &SftpSession {
        &self.0
    }
}

impl Sftp {
    pub(super) async fn write_new(&self, path: &str, contents: &[u8]) {
        use tokio::io::AsyncWriteExt;
        let mut file = self.0.create(path).await.unwrap();
        file.write_all(contents).await.unwrap();
        file.shutdown().await.unwrap();
    }
}
