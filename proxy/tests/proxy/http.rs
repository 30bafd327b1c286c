//! What passes unchanged, and when: heads, bodies, trailers, streaming.

use crate::support::{Client, TestMachine, echo_guest, guest, http_proxy, signal};
use std::sync::atomic::Ordering;
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;

/// A guest that hands its first connection to the test.
async fn handed_guest() -> (std::net::SocketAddr, oneshot::Receiver<Client>) {
    let (send, receive) = oneshot::channel();
    let send = std::sync::Mutex::new(Some(send));
    let address = guest(move |client, _| {
        if let Some(send) = send.lock().unwrap().take() {
            drop(send.send(client));
        }
        async {}
    })
    .await;
    (address, receive)
}

#[tokio::test]
async fn a_head_arrives_byte_for_byte() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let request = "DELETE /a//b/../%2e%2F?q=%20+&&x=;'! HTTP/1.1\r\nHost: 127.0.0.1:1234\r\nX-ODD-Case: A  b\r\n\
                   accept: */*\r\nCookie: a=1\r\nX-Empty:\r\nCookie: b=2\r\nAuthorization: Bearer t\r\n\r\n";
    let mut client = proxy.connect().await;
    client.send(request).await;
    let (head, echoed) = client.response().await;
    // Equal names are written together, in their order.
    let expected = request
        .replace("Cookie: b=2\r\n", "")
        .replace("a=1\r\n", "a=1\r\nCookie: b=2\r\n");
    assert_eq!(echoed, expected);
    assert_eq!(
        head,
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", echoed.len())
    );
}

#[tokio::test]
async fn a_response_head_arrives_byte_for_byte() {
    let (address, guest) = handed_guest().await;
    let machine = TestMachine::at(address);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut guest = guest.await.unwrap();
    guest.head().await;
    let response = "HTTP/1.1 418 I'm a teapot\r\nDate: then\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n\
                    X-CASE: v\r\nContent-Length: 2\r\n\r\nok";
    guest.send(response).await;
    let (head, body) = client.response().await;
    assert_eq!(head + &body, response);
}

#[tokio::test]
async fn a_request_body_is_streamed_and_counted() {
    for (framing, first, second) in [
        ("Content-Length: 6", "abc", "def"),
        (
            "Transfer-Encoding: chunked",
            "3\r\nabc\r\n",
            "3\r\ndef\r\n0\r\n\r\n",
        ),
    ] {
        let (address, guest) = handed_guest().await;
        let machine = TestMachine::at(address);
        let proxy = http_proxy(&machine);
        let mut client = proxy.connect().await;
        client
            .send(&format!("POST / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n{first}"))
            .await;
        let mut guest = guest.await.unwrap();
        assert!(guest.head().await.contains(framing));
        assert_eq!(
            guest.exactly(first.len()).await,
            first,
            "the first part was not passed on at once"
        );
        client.send(second).await;
        assert_eq!(guest.exactly(second.len()).await, second);
        guest.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        client.response().await;
        assert_eq!(machine.activity.to_guest_bytes(), 6);
    }
}

#[tokio::test]
async fn events_are_passed_on_at_once_and_the_guard_lasts_as_long() {
    let (address, guest) = handed_guest().await;
    let machine = TestMachine::at(address);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client.send("GET /events HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut guest = guest.await.unwrap();
    guest.head().await;
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    guest.send(head).await;
    assert_eq!(client.head().await, head);
    for n in 0..3 {
        let event = format!("8\r\ndata: {n}\n\r\n").replace("8\r", "8\r");
        guest.send(&event).await;
        assert_eq!(client.exactly(event.len()).await, event);
        assert_eq!(machine.guards.load(Ordering::SeqCst), 1);
    }
    guest.send("0\r\n\r\n").await;
    client.until("0\r\n\r\n").await;
    assert_eq!(machine.activity.from_guest_bytes(), 24);
    // The next request is answered only after the body, and its guard, are gone.
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    guest.head().await;
    assert_eq!(machine.guards.load(Ordering::SeqCst), 1);
    guest.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.head().await, "HTTP/1.1 204 No Content\r\n\r\n");
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_guest() {
    let (address, guest) = handed_guest().await;
    let machine = TestMachine::at(address);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut guest = guest.await.unwrap();
    guest.head().await;
    const LEN_BYTES: usize = 64 << 20;
    guest
        .send(&format!("HTTP/1.1 200 OK\r\nContent-Length: {LEN_BYTES}\r\n\r\n"))
        .await;
    client.head().await;
    let (sent, all_sent) = signal();
    let writer = tokio::spawn(async move {
        let block = vec![b'x'; 1 << 16];
        for _ in 0..LEN_BYTES / block.len() {
            guest.stream.write_all(&block).await.unwrap();
        }
        sent.add_permits(1);
        guest
    });
    let stalled = tokio::time::timeout(std::time::Duration::from_millis(500), all_sent.acquire()).await;
    assert!(stalled.is_err(), "64 MiB went somewhere without a reader");
    assert!(machine.activity.from_guest_bytes() < 32 << 20);
    assert_eq!(client.exactly(LEN_BYTES).await.len(), LEN_BYTES);
    writer.await.unwrap();
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let (address, guest) = handed_guest().await;
    let machine = TestMachine::at(address);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    let request = "POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTrailer: x-sum\r\n\
                   Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-sum: 1\r\n\r\n";
    client.send(request).await;
    let mut guest = guest.await.unwrap();
    let head = guest.head().await;
    assert!(head.contains("TE: trailers\r\nTrailer: x-sum\r\n"), "{head}");
    assert_eq!(guest.until("\r\n\r\n").await, "1\r\na\r\n0\r\nx-sum: 1\r\n\r\n");
    let response = "HTTP/1.1 200 OK\r\nTrailer: grpc-status\r\nTransfer-Encoding: chunked\r\n\r\n\
                    1\r\nb\r\n0\r\ngrpc-status: 0\r\n\r\n";
    guest.send(response).await;
    assert_eq!(client.head().await + &client.until("\r\n\r\n").await, response);
}

#[tokio::test]
async fn answers_without_a_body_keep_their_headers_and_the_connection() {
    let (address, guest) = handed_guest().await;
    let machine = TestMachine::at(address);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut guest = guest.await.unwrap();
    for response in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n",
        "HTTP/1.1 200 OK\r\nETag: \"x\"\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n",
    ] {
        guest.head().await;
        guest.send(response).await;
        assert_eq!(client.head().await, response);
        client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    }
    assert_eq!(machine.n_fresh(), 1);
}

#[tokio::test]
async fn an_old_server_that_ends_its_body_with_the_connection_is_understood() {
    let script = |mut client: Client, _| async move {
        client.head().await;
        client.send("HTTP/1.0 200 OK\r\n\r\nuntil the end").await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    for n in 1..=2 {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(
            client.head().await,
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        assert_eq!(client.until("0\r\n\r\n").await, "D\r\nuntil the end\r\n0\r\n\r\n");
        assert_eq!(machine.n_fresh(), n);
    }
    let old = proxy.exchange("GET / HTTP/1.0\r\n\r\n").await;
    assert!(
        old.starts_with("HTTP/1.0 200 OK\r\n") && old.ends_with("\r\n\r\nuntil the end"),
        "{old}"
    );
}

#[tokio::test]
async fn a_body_that_breaks_off_in_the_guest_breaks_off_at_the_client() {
    let script = |mut client: Client, _| async move {
        client.head().await;
        client
            .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            .await;
    };
    let machine = TestMachine::at(guest(script).await);
    let all = http_proxy(&machine)
        .exchange("GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        .await;
    assert!(
        all.ends_with("3\r\nabc\r\n"),
        "a broken body was passed off as a complete one: {all:?}"
    );
}

#[tokio::test]
async fn the_guest_decides_about_100_continue() {
    let (address, guest) = handed_guest().await;
    let machine = TestMachine::at(address);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    let head = "PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
    client.send(head).await;
    let mut guest = guest.await.unwrap();
    assert_eq!(guest.head().await, head);
    guest.send("HTTP/1.1 100 Continue\r\n\r\n").await;
    assert_eq!(client.head().await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.send("abc").await;
    assert_eq!(guest.exactly(3).await, "abc");
    guest
        .send("HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        .await;
    assert!(client.head().await.starts_with("HTTP/1.1 201"));
}

#[tokio::test]
async fn a_guest_that_refuses_an_expectation_never_sees_the_body() {
    let (address, guest) = handed_guest().await;
    let machine = TestMachine::at(address);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client
        .send("PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        .await;
    let mut guest = guest.await.unwrap();
    guest.head().await;
    guest
        .send("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        .await;
    assert!(client.head().await.starts_with("HTTP/1.1 401"));
    drop(client);
    assert_eq!(guest.rest().await, "");
}

#[tokio::test]
async fn an_early_answer_reaches_a_client_that_still_uploads() {
    let script = |mut client: Client, _| async move {
        client.head().await;
        client
            .send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .await;
        client.stream.shutdown().await.unwrap();
        client.rest().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client
        .send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nabc")
        .await;
    assert!(client.head().await.starts_with("HTTP/1.1 413 "));
}

#[tokio::test]
async fn a_large_body_arrives_whole() {
    let script = |mut client: Client, _| async move {
        client.head().await;
        let body = client.exactly(3 << 20).await;
        let sum: u64 = body.bytes().map(u64::from).sum();
        let text = sum.to_string();
        client
            .send(&format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            ))
            .await;
        client.rest().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let body: String = (0..3 << 20)
        .map(|n: u32| char::from(b'a' + u8::try_from(n % 23).unwrap()))
        .collect();
    let sum: u64 = body.bytes().map(u64::from).sum();
    let mut client = proxy.connect().await;
    client
        .send(&format!(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await;
    assert_eq!(client.response().await.1, sum.to_string());
}
