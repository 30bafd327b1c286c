//! Slow clients, on tokio's paused clock: it jumps to the next timer when nothing else is to be done.

use crate::support::{TestMachine, echo_guest, http_proxy};
use std::time::Duration;
use tokio::time::Instant;

async fn time_to_end(first: &str) -> Duration {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    client.send(first).await;
    let began = Instant::now();
    let answers = client.rest().await;
    assert_eq!(
        answers.matches("HTTP/1.1").count(),
        first.matches("\r\n\r\n").count() * 2,
        "{answers}"
    );
    began.elapsed()
}

// Client::rest gives up after 60 s of the same clock, so an idle connection can't be waited for with it.
#[tokio::test(start_paused = true)]
async fn a_head_that_never_ends_is_given_up_after_thirty_seconds() {
    for first in ["", "GET / HT", "GET / HTTP/1.1\r\nHost: a\r\nX: "] {
        let taken = time_to_end(first).await;
        assert!((29..=31).contains(&taken.as_secs()), "{first:?}: {taken:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_lives_for_at_least_75_seconds() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        client.response().await;
        tokio::time::sleep(Duration::from_secs(75)).await;
    }
    client
        .send("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(client.response().await.0.starts_with("HTTP/1.1 200"));
}
