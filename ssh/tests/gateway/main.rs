//! The gateway over a backend without machines, driven by a real SSH client.

#![expect(
    clippy::unwrap_used,
    reason = "tests; clippy.toml only sees #[test] functions"
)]

mod fake;

use fake::Fake;
use russh::client::{self, Handle};
use russh::keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{ChannelMsg, ChannelOpenFailure, Sig};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use torpor_ssh::{Authority, Gateway, GatewayConfig, KeyPair, PrivateKey};

struct Trusting;

impl client::Handler for Trusting {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

fn new_key() -> PrivateKey {
    PrivateKey::from_openssh(KeyPair::generate("test").unwrap().private_key).unwrap()
}

async fn gateway(fake: Fake) -> (Arc<Fake>, Gateway) {
    let fake = Arc::new(fake);
    let config = GatewayConfig {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        host_key: new_key(),
        authority: Arc::new(Authority::new(new_key())),
        max_connections: 8,
    };
    let gateway = Gateway::start(config, Arc::clone(&fake) as _).await.unwrap();
    (fake, gateway)
}

async fn connect(gateway: &Gateway) -> Handle<Trusting> {
    let config = Arc::new(client::Config::default());
    client::connect(config, gateway.address(), Trusting)
        .await
        .unwrap()
}

/// A client that shows any key at all and the API key in its user name.
async fn logged_in(gateway: &Gateway, user: &str) -> Handle<Trusting> {
    let mut client = connect(gateway).await;
    let key = PrivateKeyWithHashAlg::new(Arc::new(new_key()), None);
    assert!(client.authenticate_publickey(user, key).await.unwrap().success());
    client
}

#[tokio::test]
async fn the_channel_waits_for_the_wake_and_the_login_does_not() {
    let fake = Fake::new();
    fake.awake.send_replace(false);
    let (fake, gateway) = gateway(fake).await;
    let client = logged_in(&gateway, "web:the-api-key").await;
    assert_eq!(fake.wakes.load(Ordering::SeqCst), 0);
    let opening = client.channel_open_session();
    tokio::pin!(opening);
    // A keep-alive is answered meanwhile.
    tokio::select! {
        _ = &mut opening => panic!("open before the machine was awake"),
        answered = client.send_ping() => answered.unwrap(),
    }
    fake.awake.send_replace(true);
    let mut channel = opening.await.unwrap();
    channel.exec(true, "echo in").await.unwrap();
    loop {
        match channel.wait().await.unwrap() {
            ChannelMsg::Data { data } => break assert_eq!(&data[..], b"in\n"),
            ChannelMsg::ExitStatus { .. } => panic!("no output"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_wake_that_fails_refuses_the_channel_and_says_why() {
    let (_, gateway) = gateway(Fake::new()).await;
    let client = logged_in(&gateway, "refused@web:the-api-key").await;
    match client.channel_open_session().await {
        Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::ConnectFailed)) => {}
        Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::Other { reason, .. })) => {
            assert!(reason.contains("the host is full"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_guesser_is_no_longer_listened_to_and_others_are() {
    let (fake, gateway) = gateway(Fake::new()).await;
    for _ in 0..4 {
        let mut client = connect(&gateway).await;
        for _ in 0..11 {
            let _ = client.authenticate_password("guessed", "wrong").await;
        }
    }
    let asked = fake.logins.load(Ordering::SeqCst);
    assert!(
        (30..40).contains(&asked),
        "{asked} of 44 guesses reached the backend"
    );
    let mut client = connect(&gateway).await;
    let other = client.authenticate_password("web", "the password").await.unwrap();
    assert!(other.success());
}

#[tokio::test]
async fn sizes_and_signals_reach_the_process_and_a_killed_one_is_told_as_such() {
    let (fake, gateway) = gateway(Fake::new()).await;
    let client = logged_in(&gateway, "web:the-api-key").await;
    let mut channel = client.channel_open_session().await.unwrap();
    channel.exec(true, "read line; kill -TERM $$").await.unwrap();
    channel.window_change(100, 50, 0, 0).await.unwrap();
    channel.signal(Sig::USR1).await.unwrap();
    channel.data(&b"go\n"[..]).await.unwrap();
    let signal = loop {
        match channel.wait().await.unwrap() {
            ChannelMsg::ExitSignal { signal_name, .. } => break signal_name,
            ChannelMsg::ExitStatus { exit_status } => panic!("exited with {exit_status}"),
            _ => {}
        }
    };
    assert!(matches!(signal, Sig::TERM), "{signal:?}");
    assert_eq!(*fake.told.lock().unwrap(), ["100x50", "signal 10"]);
}

#[tokio::test]
async fn a_process_that_reads_nothing_stalls_no_other_channel() {
    let (_, gateway) = gateway(Fake::new()).await;
    let client = logged_in(&gateway, "web:the-api-key").await;
    let stalled = client.channel_open_session().await.unwrap();
    stalled.exec(true, "sleep 1000").await.unwrap();
    stalled.data(&vec![0; 6 << 20][..]).await.unwrap();
    let mut other = client.channel_open_session().await.unwrap();
    other.exec(true, "exit 5").await.unwrap();
    loop {
        if let ChannelMsg::ExitStatus { exit_status } = other.wait().await.unwrap() {
            break assert_eq!(exit_status, 5);
        }
    }
}

#[tokio::test]
async fn hostile_sftp_packets_are_answered_or_end_the_session_alone() {
    let (_, gateway) = gateway(Fake::new()).await;
    let client = logged_in(&gateway, "web:the-api-key").await;
    let sftp = async || {
        let channel = client.channel_open_session().await.unwrap();
        channel.request_subsystem(true, "sftp").await.unwrap();
        channel.into_stream()
    };
    // A stat whose path is not there, with request number 7.
    let mut stream = sftp().await;
    stream.write_all(&[0, 0, 0, 5, 17, 0, 0, 0, 7]).await.unwrap();
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(
        (answer[4], &answer[5..]),
        (101, &[0, 0, 0, 7][..]),
        "a status for it"
    );
    // A packet of 4 GiB.
    let mut stream = sftp().await;
    stream.write_all(&[0xff, 0xff, 0xff, 0xff, 1]).await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
    assert!(client.channel_open_session().await.is_ok());
}

#[tokio::test]
async fn an_sftp_session_ends_with_a_status_because_scp_fails_without_one() {
    let (_, gateway) = gateway(Fake::new()).await;
    let client = logged_in(&gateway, "web:the-api-key").await;
    let mut channel = client.channel_open_session().await.unwrap();
    channel.request_subsystem(true, "sftp").await.unwrap();
    channel.data(&[0, 0, 0, 5, 1, 0, 0, 0, 3][..]).await.unwrap();
    channel.eof().await.unwrap();
    let mut status = None;
    while let Some(message) = channel.wait().await {
        if let ChannelMsg::ExitStatus { exit_status } = message {
            status = Some(exit_status);
        }
    }
    assert_eq!(status, Some(0));
}

#[tokio::test]
async fn a_login_may_take_a_minute_and_a_connection_outlasts_it() {
    let (_, gateway) = gateway(Fake::new()).await;
    let slow = connect(&gateway).await;
    let client = logged_in(&gateway, "web:the-api-key").await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(61)).await;
    tokio::time::resume();
    while !slow.is_closed() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    client.send_ping().await.unwrap();
    client.channel_open_session().await.unwrap();
}

#[tokio::test]
async fn what_is_no_ssh_client_is_cut_off_and_shutdown_does_not_wait_for_it() {
    let (_, gateway) = gateway(Fake::new()).await;
    let mut stream = tokio::net::TcpStream::connect(gateway.address()).await.unwrap();
    let mut banner = [0; 11];
    stream.read_exact(&mut banner).await.unwrap();
    assert_eq!(&banner, b"SSH-2.0-Tor");
    let client = logged_in(&gateway, "web:the-api-key").await;
    let begun = Instant::now();
    gateway.shutdown(Duration::from_secs(2)).await;
    assert!(begun.elapsed() < Duration::from_secs(10));
    while !client.is_closed() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
