//! Clients that lie about framing, send too much, or close at bad moments.

use crate::support::{Client, TestMachine, echo_guest, guest, http_proxy};
use std::sync::{Arc, Mutex};
use tokio::io::AsyncReadExt;

/// A guest that records all it is sent and answers every connection once.
async fn recording_guest() -> (std::net::SocketAddr, Arc<Mutex<String>>) {
    let record = Arc::new(Mutex::new(String::new()));
    let shared = Arc::clone(&record);
    let script = move |mut client: Client, _| {
        let record = Arc::clone(&shared);
        async move {
            let mut bytes = [0; 4096];
            let mut answered = false;
            while let Ok(n_read @ 1..) = client.stream.read(&mut bytes).await {
                record
                    .lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&bytes[..n_read]));
                if !answered && record.lock().unwrap().contains("\r\n\r\n") {
                    answered = true;
                    client
                        .send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                        .await;
                }
            }
        }
    };
    (guest(script).await, record)
}

#[tokio::test]
async fn a_request_with_two_framings_never_reaches_the_guest_as_such() {
    let smuggled = "0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";
    for framing in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\nContent-Length: 4",
    ] {
        let (address, record) = recording_guest().await;
        let machine = TestMachine::at(address);
        let request = format!("POST / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n{smuggled}");
        let answers = http_proxy(&machine).exchange(&request).await;
        let record = record.lock().unwrap().clone();
        assert!(
            !record.to_ascii_lowercase().contains("content-length"),
            "{record}"
        );
        assert!(!record.contains("/smuggled"), "{framing}: {record}");
        assert_eq!(
            answers.matches("HTTP/1.1 ").count(),
            1,
            "the connection was used again: {answers}"
        );
    }
}

#[tokio::test]
async fn malformed_heads_and_framings_are_400_and_ask_nobody() {
    for request in [
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 4\r\n\r\nabcd",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n folded\r\n\r\n",
        "GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/3.7\r\nHost: a\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\u{7f}",
    ] {
        let machine = TestMachine::at(echo_guest().await);
        let answer = http_proxy(&machine).exchange(request).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
            "{request:?}: {answer}"
        );
        assert!(
            machine.asked.lock().unwrap().is_empty(),
            "{request:?} woke the machine"
        );
    }
}

#[tokio::test]
async fn a_bad_chunk_is_the_clients_fault_and_never_ends_a_body() {
    for body in [
        "zz\r\nabc\r\n0\r\n\r\n",
        "3\r\nabcXX0\r\n\r\n",
        "fffffffffffffffff\r\n",
    ] {
        let (address, record) = recording_guest().await;
        let machine = TestMachine::at(address);
        let request = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        let proxy = http_proxy(&machine);
        let answer = proxy.exchange(&request).await;
        assert!(answer.matches("HTTP/1.1 ").count() <= 1, "{answer}");
        assert!(
            !record.lock().unwrap().contains("0\r\n\r\n"),
            "{body:?} looked complete to the guest"
        );
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_never_looks_complete() {
    let (address, record) = recording_guest().await;
    let machine = TestMachine::at(address);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client
        .send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        .await;
    client.head().await;
    drop(client);
    proxy.proxy.shutdown(std::time::Duration::from_secs(30)).await;
    assert!(!record.lock().unwrap().contains("0\r\n\r\n"));
}

#[tokio::test]
async fn a_head_beyond_64_kib_is_431_and_one_below_passes() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let large = "x".repeat(60 << 10);
    let mut client = proxy.connect().await;
    client
        .send(&format!("GET / HTTP/1.1\r\nHost: a\r\nX-Large: {large}\r\n\r\n"))
        .await;
    assert!(client.response().await.1.contains(&large));
    let mut client = proxy.connect().await;
    let huge = "x".repeat(66 << 10);
    client
        .send(&format!("GET / HTTP/1.1\r\nHost: a\r\nX-Huge: {huge}\r\n"))
        .await;
    assert!(client.head().await.starts_with("HTTP/1.1 431 "));
    let mut client = proxy.connect().await;
    let many: String = (0..300).map(|n| format!("X-{n}: 1\r\n")).collect();
    client
        .send(&format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n"))
        .await;
    assert!(client.head().await.starts_with("HTTP/1.1 431 "));
    assert_eq!(machine.asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn an_absolute_target_and_a_lying_host_agree_in_the_guest() {
    let machine = TestMachine::at(echo_guest().await);
    let request = "GET http://real.example:81/p?q HTTP/1.1\r\nHost: decoy\r\nConnection: close\r\n\r\n";
    let answer = http_proxy(&machine).exchange(request).await;
    assert!(
        answer.ends_with("GET /p?q HTTP/1.1\r\nHost: real.example:81\r\n\r\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn connect_is_refused_and_options_star_passes() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let answer = proxy
        .exchange("CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    let answer = proxy
        .exchange("OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(
        answer.ends_with("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_over_one_link() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    let all: String = (0..50)
        .map(|n| format!("GET /{n} HTTP/1.1\r\nHost: a\r\n\r\n"))
        .collect();
    client.send(&all).await;
    for n in 0..50 {
        assert!(
            client
                .response()
                .await
                .1
                .starts_with(&format!("GET /{n} HTTP/1.1"))
        );
    }
    assert_eq!((machine.n_fresh(), machine.n_held()), (1, 49));
}

#[tokio::test]
async fn a_guest_that_answers_twice_poisons_nobody_elses_response() {
    let script = |mut client: Client, _| async move {
        client.head().await;
        let one = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n";
        client.send(&format!("{one}ok{one}no")).await;
        client.rest().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert_eq!(client.response().await.1, "ok");
    }
}

#[tokio::test]
async fn a_guest_that_switches_protocols_unasked_is_a_502() {
    let script = |mut client: Client, _| async move {
        client.head().await;
        client
            .send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")
            .await;
        client.rest().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let answer = http_proxy(&machine)
        .exchange("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
}
