//! Connections that clients keep open over pauses of the machine.

use super::*;
use crate::machine::fleet::PolicyRule;
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use torpor_api::http::PatchWake;

/// A server in the guest that sends everything back.
async fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    address
}

/// A WebSocket server in the guest that sends every text back, and tells of each ping that it saw.
async fn websocket_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
                let mut n_pings = 0;
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_ping() {
                        n_pings += 1;
                    } else if let Ok(text) = message.to_text() {
                        socket
                            .send(Message::text(format!("{text} {n_pings}")))
                            .await
                            .unwrap();
                    }
                }
            });
        }
    });
    address
}

async fn exposed(world: &World, kind: ServiceKind, guest: SocketAddr) -> (MachineId, u16, Arc<Proxy>) {
    let config = ProxyConfig {
        listen_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        ..ProxyConfig::default()
    };
    let proxy = Arc::new(Proxy::new(config, Arc::new(FleetWaker(world.fleet.clone()))));
    world.host.serve(80, guest);
    let id = world.create().await;
    let spec = ServiceSpec {
        name: None,
        port: 80,
        kind,
        auth: ServiceAuth::None,
        wake_deadline_ms: None,
    };
    let service = world.fleet.expose(&id, spec).await.unwrap();
    let listen_port = proxy.expose(0, kind).unwrap();
    let route = crate::store::ServiceRoute {
        listen_port,
        ..crate::store::ServiceRoute::of(&id, &service)
    };
    world.fleet.routes().open(route).unwrap();
    (id, listen_port, proxy)
}

async fn echoes(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(back, text.as_bytes());
}

async fn says(socket: &mut WebSocketStream<TcpStream>, text: &str) -> String {
    socket.send(Message::text(text)).await.unwrap();
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Text(text) => return text.to_string(),
            Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

async fn websocket(port: u16) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    tokio_tungstenite::client_async("ws://guest/", stream)
        .await
        .unwrap()
        .0
}

#[tokio::test]
async fn an_idle_tcp_connection_outlasts_pauses_and_its_bytes_wake() {
    let world = World::new();
    let (id, port, _proxy) = exposed(&world, ServiceKind::Tcp, echo_server().await).await;
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    echoes(&mut stream, "before").await;
    for n in 1..=3 {
        world.pause(&id).await.unwrap();
        assert_eq!(
            (world.status(&id).await, world.host.n_parked()),
            (MachineStatus::Paused, 1)
        );
        echoes(&mut stream, &format!("after pause {n}")).await;
        assert_eq!((world.host.n_restores(), world.host.n_parked()), (n, 0));
    }
    world.pause(&id).await.unwrap();
    drop(stream);
    while world.host.n_parked() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        world.status(&id).await,
        MachineStatus::Paused,
        "a client that goes wakes nobody"
    );
    assert_eq!(world.host.n_restores(), 3);
}

#[tokio::test]
async fn a_websocket_outlasts_pauses_and_its_pings_are_answered_without_waking() {
    let world = World::new();
    let (id, port, _proxy) = exposed(&world, ServiceKind::Http, websocket_server().await).await;
    let mut socket = websocket(port).await;
    assert_eq!(says(&mut socket, "a").await, "a 0");
    socket.send(Message::Ping("awake".into())).await.unwrap();
    assert_eq!(
        says(&mut socket, "b").await,
        "b 1",
        "a ping to a running guest is the guest's"
    );
    world.pause(&id).await.unwrap();
    socket.send(Message::Ping("asleep".into())).await.unwrap();
    let answer = socket.next().await.unwrap().unwrap();
    assert_eq!(answer, Message::Pong("asleep".into()));
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
    assert_eq!(says(&mut socket, "c").await, "c 1");
    assert_eq!(world.host.n_restores(), 1);
    world.pause(&id).await.unwrap();
    socket.close(None).await.unwrap();
    while let Some(Ok(message)) = socket.next().await {
        assert!(message.is_close(), "{message:?}");
    }
    assert_eq!(
        (world.status(&id).await, world.host.n_parked()),
        (MachineStatus::Paused, 0)
    );
}

#[tokio::test]
async fn a_ping_is_no_activity_and_a_message_is() {
    let world = World::new();
    let (id, port, _proxy) = exposed(&world, ServiceKind::Http, websocket_server().await).await;
    let mut socket = websocket(port).await;
    says(&mut socket, "a").await;
    let activity = Arc::clone(
        &world
            .fleet
            .wake(&id, WakeSource::Http, serde_json::Value::Null)
            .await
            .unwrap()
            .activity,
    );
    let bytes = || activity.to_guest_bytes() + activity.from_guest_bytes();
    let before = bytes();
    socket.send(Message::Ping("x".into())).await.unwrap();
    assert!(socket.next().await.unwrap().unwrap().is_pong());
    assert_eq!(bytes(), before);
    says(&mut socket, "b").await;
    assert!(bytes() > before);
}

#[tokio::test]
async fn what_loses_the_guests_memory_ends_its_connections() {
    let world = World::new();
    let (id, port, _proxy) = exposed(&world, ServiceKind::Tcp, echo_server().await).await;
    let ends = async |mut stream: TcpStream, why: &str| {
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest).await;
        assert!(
            ended.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset),
            "{why}"
        );
    };
    let connected = async || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        echoes(&mut stream, "x").await;
        stream
    };
    let stream = connected().await;
    world.pause(&id).await.unwrap();
    world.host.lose_parked();
    ends(stream, "the kept network was given up").await;
    let stream = connected().await;
    world.host.live(&id)[0].end(torpor_api::vmm::ExitReason::Reboot);
    ends(stream, "the guest rebooted").await;
    let stream = connected().await;
    world.pause(&id).await.unwrap();
    world
        .fleet
        .resume(&id, torpor_api::http::ResumeFrom::Disk)
        .await
        .unwrap();
    ends(stream, "the machine was booted from its disk").await;
    let stream = connected().await;
    world.delete(&id).await.unwrap();
    ends(stream, "the machine was deleted").await;
}

#[tokio::test]
async fn a_switch_that_is_off_ends_the_connection_when_it_speaks() {
    let world = World::new();
    let (id, port, _proxy) = exposed(&world, ServiceKind::Http, websocket_server().await).await;
    let off = PatchWake {
        http: Some(false),
        ..PatchWake::default()
    };
    world.fleet.patch_wake(&id, off, PolicyRule::Any).await.unwrap();
    let mut socket = websocket(port).await;
    says(&mut socket, "a").await;
    world.pause(&id).await.unwrap();
    socket.send(Message::text("b")).await.unwrap();
    let Some(Ok(Message::Close(Some(close)))) = socket.next().await else {
        panic!("no close");
    };
    assert_eq!(
        (u16::from(close.code), close.reason.as_str()),
        (1013, "machine_paused_auto_resume_disabled")
    );
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn bytes_at_random_instants_of_pausing_and_waking_arrive_in_order() {
    let world = World::with(crate::machine::fleet::Settings {
        drain_grace: Duration::from_millis(1),
        ..Default::default()
    });
    let (id, port, _proxy) = exposed(&world, ServiceKind::Tcp, echo_server().await).await;
    let pauses = tokio::spawn({
        let (fleet, id) = (world.fleet.clone(), id.clone());
        async move {
            loop {
                let _ = fleet
                    .pause(&id, crate::machine::driver::PauseOrder::by("api"))
                    .await;
                tokio::task::yield_now().await;
            }
        }
    });
    let clients: Vec<_> = (0..4)
        .map(|client| {
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                for n in 0..200 {
                    echoes(&mut stream, &format!("client {client} message {n}\n")).await;
                    if n % 7 == client {
                        tokio::time::sleep(Duration::from_millis(3)).await;
                    }
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    pauses.abort();
    assert!(world.host.n_restores() > 0);
}
