//! Raw TCP: half-close, resets, refusals, waiting.

use crate::support::{Client, TestMachine, guest, proxy_of, tcp_proxy};
use std::io::ErrorKind;
use std::sync::atomic::Ordering;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use torpor_api::ErrorCode;
use torpor_api::http::ServiceKind;
use torpor_proxy::{ProxyConfig, Transport};

async fn end_of(client: &mut Client) -> std::io::Result<usize> {
    client.stream.read(&mut [0; 64]).await
}

#[tokio::test]
async fn bytes_pass_both_ways_and_a_half_close_is_a_half_close() {
    let script = |mut guest: Client, _| async move {
        let asked = guest.rest().await;
        guest.send(&asked.to_uppercase()).await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = tcp_proxy(&machine);
    let mut client = proxy.connect().await;
    client.send("select 1").await;
    client.stream.shutdown().await.unwrap();
    assert_eq!(client.rest().await, "SELECT 1");
    assert_eq!(
        (
            machine.activity.to_guest_bytes(),
            machine.activity.from_guest_bytes()
        ),
        (8, 8)
    );
    assert_eq!(machine.first_bytes.lock().unwrap().len(), 1);
    assert_eq!(machine.asked.lock().unwrap()[0].transport, Transport::Tcp);
}

#[tokio::test]
async fn a_guest_that_speaks_first_is_heard_by_a_client_that_only_listens() {
    let script = |mut guest: Client, _| async move { guest.send("220 ready\r\n").await };
    let machine = TestMachine::at(guest(script).await);
    machine.awake.send_replace(false);
    let proxy = tcp_proxy(&machine);
    let mut client = proxy.connect().await;
    client.stream.shutdown().await.unwrap();
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 1)
        .await;
    machine.awake.send_replace(true);
    assert_eq!(client.rest().await, "220 ready\r\n");
}

#[tokio::test]
async fn what_a_client_sends_while_the_machine_wakes_is_kept() {
    let script = |mut guest: Client, _| async move {
        let asked = guest.exactly(5).await;
        guest.send(&asked).await;
    };
    let machine = TestMachine::at(guest(script).await);
    machine.awake.send_replace(false);
    let proxy = tcp_proxy(&machine);
    let mut client = proxy.connect().await;
    client.send("hello").await;
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 1)
        .await;
    machine.awake.send_replace(true);
    assert_eq!(client.exactly(5).await, "hello");
}

#[tokio::test]
async fn a_refusal_is_a_reset() {
    let machine = TestMachine::refusing(ErrorCode::AutoResumeDisabled, "paused");
    let proxy = tcp_proxy(&machine);
    let mut client = proxy.connect().await;
    assert_eq!(
        end_of(&mut client).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn a_reset_passes_through_in_both_directions() {
    let script = |mut guest: Client, n| async move {
        guest.send("x").await;
        if n == 0 {
            guest.exactly(1).await;
            guest.stream.set_zero_linger().unwrap();
        } else {
            let ended = end_of(&mut guest).await;
            let reset = ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
            assert!(reset, "the client's reset arrived as an end");
            // Seen by the test through the listener's next connection.
            REACHED.add_permits(1);
        }
    };
    static REACHED: tokio::sync::Semaphore = tokio::sync::Semaphore::const_new(0);
    let machine = TestMachine::at(guest(script).await);
    let proxy = tcp_proxy(&machine);
    let mut client = proxy.connect().await;
    client.exactly(1).await;
    client.send("y").await;
    assert_eq!(
        end_of(&mut client).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let mut client = proxy.connect().await;
    client.exactly(1).await;
    client.stream.set_zero_linger().unwrap();
    drop(client);
    let _reached = REACHED.acquire().await.unwrap();
}

#[tokio::test]
async fn a_client_that_resets_while_it_waits_cancels_its_wait() {
    let machine = TestMachine::at("127.0.0.1:1".parse().unwrap());
    machine.awake.send_replace(false);
    let proxy = tcp_proxy(&machine);
    let client = proxy.connect().await;
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 1)
        .await;
    client.stream.set_zero_linger().unwrap();
    drop(client);
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 0)
        .await;
}

#[tokio::test]
async fn an_execution_that_ends_resets_its_connections() {
    let script = |mut guest: Client, _| async move {
        guest.send("x").await;
        guest.rest().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = tcp_proxy(&machine);
    let mut client = proxy.connect().await;
    client.exactly(1).await;
    assert_eq!(machine.guards.load(Ordering::SeqCst), 1);
    machine.over.lock().unwrap().cancel();
    assert_eq!(
        end_of(&mut client).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
}

#[tokio::test]
async fn a_connection_beyond_the_bound_is_reset() {
    let script = |mut guest: Client, _| async move {
        guest.send("x").await;
        std::future::pending::<()>().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let config = ProxyConfig {
        max_connections: 1,
        ..ProxyConfig::default()
    };
    let proxy = proxy_of(&machine, ServiceKind::Tcp, config);
    let mut first = proxy.connect().await;
    first.exactly(1).await;
    let mut second = proxy.connect().await;
    assert_eq!(
        end_of(&mut second).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
}
