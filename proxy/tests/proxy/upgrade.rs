//! Connections that become something else.

use crate::support::{Client, TestMachine, guest, http_proxy, proxy_of};
use futures_util::{SinkExt, StreamExt};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use torpor_api::http::ServiceKind;
use torpor_proxy::ProxyConfig;

async fn websocket_guest() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_text() || message.is_binary() {
                        socket.send(message).await.unwrap();
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_websocket_echoes_through_a_wake() {
    let machine = TestMachine::at(websocket_guest().await);
    machine.awake.send_replace(false);
    let proxy = http_proxy(&machine);
    let stream = TcpStream::connect(proxy.address()).await.unwrap();
    let connecting = tokio::spawn(tokio_tungstenite::client_async("ws://guest/socket?x=1", stream));
    machine
        .until(|machine| machine.waiting.load(Ordering::SeqCst) == 1)
        .await;
    machine.awake.send_replace(true);
    let (mut socket, response) = connecting.await.unwrap().unwrap();
    assert_eq!(response.status(), 101);
    for message in [Message::text("hello"), Message::binary(vec![7_u8; 200_000])] {
        socket.send(message.clone()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), message);
    }
    assert!(machine.activity.to_guest_bytes() > 200_000 && machine.activity.from_guest_bytes() > 200_000);
    assert_eq!(
        machine.guards.load(Ordering::SeqCst),
        1,
        "the guard did not last as long as the socket"
    );
    machine.over.lock().unwrap().cancel();
    assert!(
        !matches!(socket.next().await, Some(Ok(_))),
        "the socket outlived its execution"
    );
}

#[tokio::test]
async fn a_websocket_counts_as_a_connection_of_its_listener() {
    let machine = TestMachine::at(websocket_guest().await);
    let config = ProxyConfig {
        max_connections: 1,
        ..ProxyConfig::default()
    };
    let proxy = proxy_of(&machine, ServiceKind::Http, config);
    let stream = TcpStream::connect(proxy.address()).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("ws://guest/", stream)
        .await
        .unwrap();
    let answer = proxy.exchange("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(answer.contains("capacity_exceeded"), "{answer}");
    socket.send(Message::text("still here")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::text("still here"));
}

#[tokio::test]
async fn any_upgrade_passes_with_its_headers_and_the_bytes_sent_early() {
    let script = |mut guest: Client, _| async move {
        let head = guest.head().await;
        assert!(
            head.contains("Connection: keep-alive, Upgrade\r\nUpgrade: torpor/1\r\n"),
            "{head}"
        );
        guest
            .send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: torpor/1\r\n\r\nhi")
            .await;
        let asked = guest.rest().await;
        guest.send(&asked).await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client
        .send(
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: torpor/1\r\n\r\nearly",
        )
        .await;
    let head = client.head().await;
    assert_eq!(
        head,
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: torpor/1\r\n\r\n"
    );
    assert_eq!(client.exactly(2).await, "hi");
    client.send(" and late").await;
    client.stream.shutdown().await.unwrap();
    assert_eq!(client.rest().await, "early and late");
}

#[tokio::test]
async fn a_declined_upgrade_is_an_ordinary_answer() {
    let script = |mut guest: Client, _| async move {
        for _ in 0..2 {
            guest.head().await;
            guest
                .send("HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno")
                .await;
        }
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        client
            .send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            .await;
        assert_eq!(client.response().await.1, "no");
    }
    // What may outlast a pause has a connection of its own from the start.
    assert_eq!(machine.n_fresh(), 2);
}
