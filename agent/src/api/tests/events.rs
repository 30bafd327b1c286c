//! Events as they happen, from any offset, over both transports.

use super::*;
use crate::machine::fleet::WakeSource;
use futures_util::StreamExt;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;

struct Listening {
    world: World,
    router: Router,
    address: SocketAddr,
    id: String,
}

impl Listening {
    /// A machine that has slept once.
    async fn new() -> Self {
        let world = World::new();
        let router = router(world.fleet.clone());
        let (id, _) = created(&router).await;
        let parsed = id.parse().unwrap();
        world.pause(&parsed).await.unwrap();
        world.resume(&parsed).await.unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let served = serve_tcp(any, router.clone(), std::future::pending()).await;
        Self {
            world,
            router,
            address: served.unwrap().0,
            id,
        }
    }

    /// What the table holds: offsets and kinds.
    async fn stored(&self) -> Vec<(u64, String)> {
        let path = format!("/v1/machines/{}/events?limit=1000", self.id);
        let answer = call(&self.router, "GET", &path, Value::Null).await.body;
        let events = answer["events"].as_array().unwrap().iter();
        events.map(offset_and_kind).collect()
    }

    async fn pause(&self) {
        self.world.pause(&self.id.parse().unwrap()).await.unwrap();
    }

    async fn sse(&self, query: &str, fields: &str) -> Lines<BufReader<TcpStream>> {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let path = format!("/v1/machines/{}/events/stream{query}", self.id);
        let request = format!("GET {path} HTTP/1.1\r\nhost: h\r\n{fields}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        BufReader::new(stream).lines()
    }
}

fn offset_and_kind(event: &Value) -> (u64, String) {
    let kind = event["kind"].as_str().unwrap().to_owned();
    (event["offset"].as_u64().unwrap(), kind)
}

async fn next(lines: &mut Lines<BufReader<TcpStream>>) -> (u64, String) {
    let told = async {
        loop {
            let line = lines.next_line().await.unwrap().unwrap();
            if let Some(data) = line.strip_prefix("data: ") {
                return offset_and_kind(&serde_json::from_str(data).unwrap());
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), told).await.unwrap()
}

#[tokio::test]
async fn events_are_told_from_any_offset_and_go_on_as_they_happen() {
    let host = Listening::new().await;
    let stored = host.stored().await;
    assert!(stored.len() >= 4, "{stored:?}");
    for from in 0..=stored.len() {
        let after = from.checked_sub(1).map_or(0, |last| stored[last].0);
        let mut lines = host.sse(&format!("?after={after}"), "").await;
        for event in &stored[from..] {
            assert_eq!(next(&mut lines).await, *event, "after {after}");
        }
    }
    let last = stored.last().unwrap().0;
    let mut lines = host.sse(&format!("?after={last}"), "").await;
    host.pause().await;
    let (offset, kind) = next(&mut lines).await;
    assert!(offset > last && kind == "machine.paused", "{offset} {kind}");
}

#[tokio::test]
async fn a_client_that_connects_again_is_told_nothing_twice() {
    let host = Listening::new().await;
    let stored = host.stored().await;
    let seen = format!("last-event-id: {}\r\n", stored[2].0);
    for query in ["", "?after=0"] {
        let mut lines = host.sse(query, &seen).await;
        assert_eq!(next(&mut lines).await, stored[3]);
    }
}

#[tokio::test]
async fn a_websocket_is_told_the_same() {
    let host = Listening::new().await;
    let stored = host.stored().await;
    let url = format!(
        "ws://h/v1/machines/{}/events/stream?after={}",
        host.id, stored[0].0
    );
    let stream = TcpStream::connect(host.address).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    host.pause().await;
    let mut told = Vec::new();
    while told.len() + 1 < host.stored().await.len() {
        let message = socket.next().await.unwrap().unwrap();
        told.push(offset_and_kind(
            &serde_json::from_str(message.to_text().unwrap()).unwrap(),
        ));
    }
    assert_eq!(told, host.stored().await[1..]);
}

#[tokio::test]
async fn why_says_who_woke_the_machine_from_where_and_what_for_and_wakes_nothing() {
    let host = Listening::new().await;
    let why = async || {
        let path = format!("/v1/machines/{}/why", host.id);
        call(&host.router, "GET", &path, Value::Null).await.body
    };
    host.pause().await;
    let asleep = why().await;
    assert_eq!(
        (&asleep["status"], &asleep["because"]),
        (&json!("paused"), &json!("put to sleep by api"))
    );
    let cause = json!({ "client": "192.0.2.1:5", "port": 80, "method": "GET", "path": "/cart", "user_agent": "curl/8" });
    let id = host.id.parse().unwrap();
    host.world.fleet.wake(&id, WakeSource::Http, cause).await.unwrap();
    let awake = why().await;
    assert_eq!(
        awake["because"],
        "woken by http GET /cart from 192.0.2.1:5 with curl/8 to port 80"
    );
    assert_eq!(awake["event"]["kind"], "machine.woken");
}
