//! Held links across sleeps, many waiters for one wake, clients that give up, listeners that go away.

use crate::support::{Client, TestMachine, echo_guest, guest, http_proxy, proxy_of};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpStream;
use torpor_api::http::ServiceKind;
use torpor_proxy::{OwnSockets, ProxyConfig, Sockets};

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";

#[tokio::test]
async fn a_thousand_requests_during_one_slow_wake_are_all_answered() {
    let machine = TestMachine::at(echo_guest().await);
    machine.awake.send_replace(false);
    let proxy = Arc::new(http_proxy(&machine));
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..1000 {
        let proxy = Arc::clone(&proxy);
        clients.spawn(async move {
            let mut client = proxy.connect().await;
            client
                .send(&format!("GET /{n} HTTP/1.1\r\nHost: a\r\n\r\n"))
                .await;
            client
                .response()
                .await
                .1
                .starts_with(&format!("GET /{n} HTTP/1.1\r\n"))
        });
    }
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 1000)
        .await;
    machine.awake.send_replace(true);
    let answered = clients.join_all().await;
    assert_eq!(answered.iter().filter(|right| **right).count(), 1000);
}

#[tokio::test]
async fn a_link_is_used_again_until_the_machine_slept() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        client.send(GET).await;
        client.response().await;
    }
    assert_eq!((machine.n_fresh(), machine.n_held()), (1, 2));
    machine.next_execution();
    for _ in 0..2 {
        client.send(GET).await;
        client.response().await;
    }
    assert_eq!((machine.n_fresh(), machine.n_held()), (2, 3));
}

#[tokio::test]
async fn a_link_that_the_guest_closed_between_requests_is_replaced() {
    let script = |mut client: Client, n| async move {
        client.head().await;
        client
            .send(&format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{n}"))
            .await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    for n in 0..20 {
        client.send(GET).await;
        let (head, body) = client.response().await;
        // The close may still be on its way when the next request comes; then that request was sent, and is lost.
        if head.starts_with("HTTP/1.1 200") {
            assert!(body.parse::<usize>().unwrap() <= n);
        } else {
            assert!(body.contains("upstream_closed"), "{body}");
        }
    }
}

#[tokio::test]
async fn a_request_that_was_sent_is_never_sent_again() {
    let script = |mut client: Client, n| async move {
        client.head().await;
        assert_eq!(n, 0, "the request was replayed");
        client.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        client.head().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client.send(GET).await;
    client.response().await;
    client.send(GET).await;
    let (head, body) = client.response().await;
    assert!(
        head.starts_with("HTTP/1.1 502 ") && body.contains("upstream_closed"),
        "{head}{body}"
    );
    assert_eq!(machine.n_fresh(), 1);
}

#[tokio::test]
async fn a_client_that_gives_up_cancels_its_own_wait_only() {
    let machine = TestMachine::at(echo_guest().await);
    machine.awake.send_replace(false);
    let proxy = http_proxy(&machine);
    let (mut patient, mut hasty) = (proxy.connect().await, proxy.connect().await);
    patient.send(GET).await;
    hasty.send(GET).await;
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 2)
        .await;
    drop(hasty);
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 1)
        .await;
    machine.awake.send_replace(true);
    assert!(patient.response().await.0.starts_with("HTTP/1.1 200"));
    assert_eq!(machine.n_fresh(), 1);
}

#[tokio::test]
async fn an_execution_that_ends_takes_its_requests_with_it() {
    let script = |mut client: Client, _| async move {
        if client.head().await.starts_with("GET /stream") {
            client
                .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
                .await;
        }
        std::future::pending::<()>().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let (mut streaming, mut waiting) = (proxy.connect().await, proxy.connect().await);
    streaming.send("GET /stream HTTP/1.1\r\nHost: a\r\n\r\n").await;
    streaming.until("1\r\na\r\n").await;
    waiting.send(GET).await;
    machine.until(|machine| machine.n_fresh() == 2).await;
    machine.over.lock().unwrap().cancel();
    assert!(waiting.response().await.1.contains("upstream_closed"));
    assert_eq!(
        streaming.rest().await,
        "",
        "a cut response was passed off as complete"
    );
}

#[tokio::test]
async fn hiding_a_service_frees_its_port_and_lets_requests_finish() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let (mut idle, mut busy) = (proxy.connect().await, proxy.connect().await);
    idle.send(GET).await;
    idle.response().await;
    machine.awake.send_replace(false);
    busy.send(GET).await;
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 1)
        .await;
    assert!(proxy.proxy.hide(proxy.port).await);
    assert!(!proxy.proxy.hide(proxy.port).await);
    assert_eq!(idle.rest().await, "");
    assert!(tokio::net::TcpStream::connect(proxy.address()).await.is_err());
    machine.awake.send_replace(true);
    assert!(busy.response().await.0.starts_with("HTTP/1.1 200"));
    assert_eq!(busy.rest().await, "");
    assert_eq!(
        proxy.proxy.expose(proxy.port, ServiceKind::Http).unwrap(),
        proxy.port
    );
    assert!(proxy.proxy.expose(proxy.port, ServiceKind::Http).is_err());
    assert_eq!(proxy.proxy.shutdown(Duration::from_secs(30)).await, 0);
}

#[tokio::test]
async fn connections_beyond_the_bound_are_told_and_those_within_it_are_served() {
    let machine = TestMachine::at(echo_guest().await);
    let config = ProxyConfig {
        max_connections: 2,
        ..ProxyConfig::default()
    };
    let proxy = proxy_of(&machine, ServiceKind::Http, config);
    let (mut first, mut second) = (proxy.connect().await, proxy.connect().await);
    for client in [&mut first, &mut second] {
        client.send(GET).await;
        client.response().await;
    }
    let answer = proxy.exchange(GET).await;
    assert!(
        answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
        "{answer}"
    );
    assert!(
        answer.contains("\r\nretry-after: 5\r\n") && answer.contains("\"capacity_exceeded\""),
        "{answer}"
    );
    first.send(GET).await;
    assert!(first.response().await.0.starts_with("HTTP/1.1 200"));
    drop(second);
    let within = async {
        loop {
            let mut client = proxy.connect().await;
            client.send(GET).await;
            if client.head().await.starts_with("HTTP/1.1 200") {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), within)
        .await
        .expect("the slot was not given back");
}

#[tokio::test]
async fn who_has_just_come_when_a_proxy_ends_is_answered() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    // Taken, and silent yet.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (left, answer) = tokio::join!(proxy.proxy.shutdown(Duration::from_secs(5)), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        client.send(GET).await;
        client.rest().await
    });
    assert_eq!(left, 0);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[derive(Debug, Default)]
struct Copied(Mutex<Vec<std::net::TcpListener>>);

impl Sockets for Copied {
    fn listen(&self, address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
        let listener = OwnSockets.listen(address)?;
        self.0.lock().unwrap().push(listener.try_clone()?);
        Ok(listener)
    }
}

#[tokio::test]
async fn hiding_a_service_ends_every_copy_of_its_socket_and_a_shutdown_does_not() {
    let config = ProxyConfig {
        sockets: Arc::new(Copied::default()),
        ..ProxyConfig::default()
    };
    let machine = TestMachine::at(echo_guest().await);
    let hidden = proxy_of(&machine, ServiceKind::Http, config);
    let kept = hidden.proxy.expose(0, ServiceKind::Http).unwrap();
    assert!(hidden.proxy.hide(hidden.port).await);
    assert!(TcpStream::connect(hidden.address()).await.is_err());
    hidden.proxy.shutdown(Duration::from_secs(5)).await;
    let waiting = TcpStream::connect(("127.0.0.1", kept)).await;
    waiting.expect("the copy takes who comes for the next proxy");
}
