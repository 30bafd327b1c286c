//! The answers that clients may rely on: refusals, timing, first bytes.

use crate::support::{TestMachine, echo_guest, guest, http_proxy};
use std::time::Duration;
use torpor_api::{ApiError, ErrorCode};
use torpor_proxy::{Target, Transport, WakeTrace};

const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";

fn error_in(response: &str) -> ApiError {
    let (_, body) = response.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap()
}

#[tokio::test]
async fn a_disabled_wake_is_the_seed_documents_503_to_the_byte() {
    let machine = TestMachine::refusing(ErrorCode::AutoResumeDisabled, "machine web is paused");
    let response = http_proxy(&machine).exchange(GET).await;
    let error = error_in(&response);
    assert!(error.request_id.starts_with("req_"));
    let body = format!(
        "{{\"error\":\"machine web is paused\",\"code\":\"machine_paused_auto_resume_disabled\",\
         \"retryable\":false,\"suggested_action\":\"{}\",\"request_id\":\"{}\"}}",
        ErrorCode::AutoResumeDisabled.suggested_action(),
        error.request_id
    );
    let head = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    assert_eq!(response, head + &body);
}

#[tokio::test]
async fn a_failed_or_slow_wake_is_a_503_worth_retrying() {
    for code in [
        ErrorCode::ResumeTimeout,
        ErrorCode::ResumeFailed,
        ErrorCode::CapacityExceeded,
    ] {
        let machine = TestMachine::refusing(code, "no");
        let response = http_proxy(&machine).exchange(GET).await;
        assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
        assert!(response.contains("\r\nretry-after: 5\r\n"), "{response}");
        let error = error_in(&response);
        assert!(error.retryable && error.code == code, "{response}");
    }
}

#[tokio::test]
async fn a_running_machine_without_a_server_is_a_502() {
    let machine = TestMachine::refusing(ErrorCode::ServiceUnreachable, "nothing on port 8080");
    let response = http_proxy(&machine).exchange(GET).await;
    assert!(response.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{response}");
    assert!(!response.contains("retry-after"), "{response}");
    assert_eq!(error_in(&response).code, ErrorCode::ServiceUnreachable);
}

#[tokio::test]
async fn a_connection_goes_on_after_a_refusal() {
    let machine = TestMachine::refusing(ErrorCode::ResumeTimeout, "slow");
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(client.response().await.0.starts_with("HTTP/1.1 503"));
    }
}

#[tokio::test]
async fn a_guest_that_closes_before_it_answers_is_a_502_and_is_asked_once() {
    let machine = TestMachine::at(guest(|mut client, _| async move { drop(client.head().await) }).await);
    let response = http_proxy(&machine).exchange(GET).await;
    assert!(response.starts_with("HTTP/1.1 502"), "{response}");
    assert_eq!(error_in(&response).code, ErrorCode::UpstreamClosed);
    assert_eq!(machine.n_fresh(), 1);
}

#[tokio::test]
async fn an_answer_that_is_not_http_is_a_502() {
    let script = |mut client: crate::support::Client, _| async move {
        client.head().await;
        client.send("SSH-2.0-OpenSSH\r\n\r\n").await;
    };
    let machine = TestMachine::at(guest(script).await);
    let response = http_proxy(&machine).exchange(GET).await;
    assert_eq!(error_in(&response).code, ErrorCode::UpstreamClosed, "{response}");
}

#[tokio::test]
async fn the_waker_learns_who_knocked_but_not_the_query() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let long = "p".repeat(1000);
    proxy
        .exchange(&format!(
            "POST /{long}?token=secret HTTP/1.1\r\nHost: a\r\nUser-Agent: curl/8\r\nConnection: close\r\n\r\n"
        ))
        .await;
    let asked = machine.asked.lock().unwrap().remove(0);
    assert_eq!(
        asked.target,
        Target::Service {
            listen_port: proxy.port
        }
    );
    assert_eq!(asked.transport, Transport::Http);
    assert_eq!(asked.cause.method.as_deref(), Some("POST"));
    assert_eq!(
        asked.cause.path.as_deref(),
        Some(&format!("/{}", "p".repeat(255))[..])
    );
    assert_eq!(asked.cause.user_agent.as_deref(), Some("curl/8"));
    assert_eq!(asked.held, None);
}

#[tokio::test]
async fn a_request_that_waited_for_a_wake_says_how_long_and_the_next_does_not() {
    let script = |mut client: crate::support::Client, _| async move {
        for _ in 0..2 {
            client.head().await;
            client
                .send("HTTP/1.1 200 OK\r\nServer-Timing: db;dur=5\r\nContent-Length: 0\r\n\r\n")
                .await;
        }
        client.rest().await;
    };
    let machine = TestMachine::at(guest(script).await);
    let stages = vec![
        ("decision", Duration::from_micros(20)),
        ("first_run", Duration::from_millis(3)),
    ];
    *machine.trace.lock().unwrap() = Some(WakeTrace { stages });
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    let get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    client.send(get).await;
    let (head, _) = client.response().await;
    let timings: Vec<_> = head
        .lines()
        .filter(|line| line.to_ascii_lowercase().starts_with("server-timing:"))
        .collect();
    assert_eq!(timings.len(), 2, "{head}");
    assert!(timings[0].ends_with("db;dur=5"), "{head}");
    assert!(
        timings[1].contains("torpor-wake;dur=") && timings[1].contains(", accept;dur="),
        "{head}"
    );
    assert!(
        timings[1].ends_with("decision;dur=0.020, first_run;dur=3.000"),
        "{head}"
    );
    client.send(get).await;
    assert!(!client.response().await.0.contains("torpor-wake"));
    assert_eq!(machine.first_bytes.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn host_names_are_routed_and_unknown_ones_are_404() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let any = "127.0.0.1:0".parse().unwrap();
    let address = proxy
        .proxy
        .serve_host_names(any, "Torpor.test.", torpor_proxy::Entrance::PlainOrTls)
        .unwrap();
    let mut client = crate::support::Client::over(tokio::net::TcpStream::connect(address).await.unwrap());
    client
        .send("GET / HTTP/1.1\r\nHost: 8080-web.torpor.test:7080\r\n\r\n")
        .await;
    let (_, echoed) = client.response().await;
    assert!(echoed.contains("Host: 8080-web.torpor.test:7080\r\n"), "{echoed}");
    // The same connection, another machine: the held link is not for it.
    client
        .send("GET / HTTP/1.1\r\nHost: 80-other.torpor.test\r\n\r\n")
        .await;
    client.response().await;
    client.send("GET / HTTP/1.1\r\nHost: example.org\r\n\r\n").await;
    let (head, body) = client.response().await;
    assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
    assert!(body.contains("\"code\":\"machine_not_found\""), "{body}");
    let asked = machine.asked.lock().unwrap();
    assert_eq!(
        asked[0].target,
        Target::HostName {
            port: 8080,
            machine: "web".to_owned()
        }
    );
    assert_eq!(
        asked[1].target,
        Target::HostName {
            port: 80,
            machine: "other".to_owned()
        }
    );
    assert_eq!(
        (asked.len(), asked[1].held.clone(), machine.n_fresh()),
        (2, None, 2)
    );
}
