//! A real proxy over real sockets, a real store and a simulated host.

use super::*;
use crate::machine::fleet::PolicyRule;
use crate::machine::tests::World;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use torpor_api::http::{MachineStatus, ServiceAuth, ServiceSpec};
use torpor_proxy::ProxyConfig;

/// A server in the guest: answers every request with `hello` and closes.
async fn guest_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello";
                let _ = stream.write_all(answer).await;
            });
        }
    });
    address
}

async fn get(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream
        .write_all(b"GET /page?secret HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// A machine whose port 80 is reachable, and the port of the proxy. The range of ports is shared by all tests of
/// the process, so each takes a free one of its own.
async fn served(world: &World) -> (MachineId, u16, Arc<Proxy>) {
    let config = ProxyConfig {
        listen_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        ..ProxyConfig::default()
    };
    let proxy = Arc::new(Proxy::new(config, Arc::new(FleetWaker(world.fleet.clone()))));
    world.host.serve(80, guest_server().await);
    let id = world.create().await;
    let spec = ServiceSpec {
        name: None,
        port: 80,
        kind: ServiceKind::Http,
        auth: ServiceAuth::None,
        wake_deadline_ms: None,
    };
    let service = world.fleet.expose(&id, spec).await.unwrap();
    let listen_port = proxy.expose(0, ServiceKind::Http).unwrap();
    let route = world.fleet.routes().find(service.listen_port).unwrap();
    world
        .fleet
        .routes()
        .open(crate::store::ServiceRoute { listen_port, ..route })
        .unwrap();
    (id, listen_port, proxy)
}

#[tokio::test]
async fn a_request_wakes_and_is_answered_and_its_trace_is_kept() {
    let world = World::new();
    let (id, port, _proxy) = served(&world).await;
    assert!(get(port).await.ends_with("hello"));
    world.pause(&id).await.unwrap();
    let answer = get(port).await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"),
        "{answer}"
    );
    assert!(
        answer.to_ascii_lowercase().contains("server-timing: "),
        "{answer}"
    );
    assert_eq!(world.host.live(&id)[0].n_first_bytes(), 1);
    while world.count(&id, "machine.first_byte").await == 0 {
        tokio::task::yield_now().await;
    }
    let filter = crate::store::EventFilter {
        machine: Some(id.clone()),
        after: 0,
        limit: 100,
    };
    let events = world.fleet.store().events(filter).await.unwrap();
    let woken = events.iter().find(|event| event.kind == "machine.woken").unwrap();
    assert_eq!(
        (&woken.actor[..], &woken.detail["cause"]["path"]),
        ("http", &json!("/page"))
    );
    let first_byte = events
        .iter()
        .find(|event| event.kind == "machine.first_byte")
        .unwrap();
    assert_eq!(first_byte.detail["stages"]["state_loaded_us"], 300);
    let metrics = world.fleet.telemetry().await.unwrap();
    let counted = "torpor_wake_first_byte_seconds_count{from=\"image\"} 1\n";
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn a_hundred_requests_to_a_paused_machine_are_one_restore() {
    let world = World::new();
    let (id, port, _proxy) = served(&world).await;
    world.pause(&id).await.unwrap();
    let requests: Vec<_> = (0..100).map(|_| tokio::spawn(get(port))).collect();
    for request in requests {
        assert!(request.await.unwrap().ends_with("hello"));
    }
    assert_eq!(world.host.n_restores(), 1);
}

#[tokio::test]
async fn a_switch_that_is_off_answers_503_and_nothing_listens_answers_502() {
    let world = World::new();
    let (id, port, _proxy) = served(&world).await;
    let off = torpor_api::http::PatchWake {
        http: Some(false),
        ..Default::default()
    };
    world
        .fleet
        .patch_wake(&id, off, PolicyRule::DestroyOrWake)
        .await
        .unwrap();
    world.pause(&id).await.unwrap();
    let answer = get(port).await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(
        answer.contains("\"machine_paused_auto_resume_disabled\""),
        "{answer}"
    );
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
    world.resume(&id).await.unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    world.host.serve(80, nobody);
    assert!(get(port).await.starts_with("HTTP/1.1 502"));
}

#[tokio::test]
async fn a_host_name_reaches_exposed_ports_only() {
    let world = World::new();
    let (id, _, _proxy) = served(&world).await;
    let waker = FleetWaker(world.fleet.clone());
    let resolve = |port| {
        let target = Target::HostName {
            port,
            machine: id.to_string(),
        };
        let waker = &waker;
        async move {
            waker
                .route(&target)
                .await
                .map(|route| (route.machine, route.port))
        }
    };
    assert_eq!(resolve(80).await.unwrap(), (id.clone(), 80));
    assert_eq!(resolve(81).await.unwrap_err().code, ErrorCode::ServiceNotFound);
    let unknown = Target::HostName {
        port: 80,
        machine: "no-such".to_owned(),
    };
    assert_eq!(
        waker.route(&unknown).await.unwrap_err().code,
        ErrorCode::MachineNotFound
    );
}

mod edge;
mod lines;
mod slow;
