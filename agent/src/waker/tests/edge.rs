//! Who is let in, through the real proxy.

use super::*;
use torpor_api::http::{CreateGrant, GrantStatus, GrantTransport, PatchService};

async fn ask(port: u16, path: &str, fields: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{fields}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// A server that answers a request with its own head.
async fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    head.len()
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.write_all(&head).await.unwrap();
            });
        }
    });
    address
}

async fn guarded(world: &World, auth: ServiceAuth) -> (MachineId, u16, Arc<Proxy>) {
    let (id, port, proxy) = served(world).await;
    world.host.serve(80, echo_server().await);
    let patch = PatchService {
        auth: Some(auth),
        ..PatchService::default()
    };
    let service = world.fleet.patch_service(&id, "80", patch).await.unwrap();
    let route = crate::store::ServiceRoute::of(&id, &service);
    world
        .fleet
        .routes()
        .open(crate::store::ServiceRoute {
            listen_port: port,
            ..route
        })
        .unwrap();
    (id, port, proxy)
}

fn code(answer: &str) -> Option<String> {
    let body = answer.split_once("\r\n\r\n")?.1;
    let error: serde_json::Value = serde_json::from_str(body).ok()?;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    Some(error["code"].as_str()?.to_owned())
}

#[tokio::test]
async fn a_signed_url_survives_pauses_and_everything_else_is_401_and_wakes_nothing() {
    let world = World::new();
    let (id, port, _proxy) = guarded(&world, ServiceAuth::Token).await;
    let issue = |transport| CreateGrant {
        expires_in_seconds: Some(60),
        transport,
    };
    let issued = world
        .fleet
        .issue_grant(&id, 80, issue(GrantTransport::Any))
        .await
        .unwrap();
    let sockets = world
        .fleet
        .issue_grant(&id, 80, issue(GrantTransport::Websocket))
        .await
        .unwrap();
    let (token, socket_token) = (&issued.token, &sockets.token);
    assert!(issued.url.unwrap().ends_with(&format!("/?edge_token={token}")));
    assert!(issued.websocket_url.unwrap().starts_with("ws://"));
    world.pause(&id).await.unwrap();
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\n";
    let cookie = format!("cookie: torpor_edge_{id}_80={token}\r\n");
    for (path, fields, expected) in [
        ("/", "", "edge_token_missing"),
        ("/?edge_token=", "", "edge_token_invalid"),
        ("/", "x-edge-token: tpe1.k.e30.AA\r\n", "edge_token_invalid"),
        (
            &format!("/?edge_token={socket_token}"),
            "",
            "edge_token_scope_mismatch",
        ),
        ("/", &format!("{cookie}{upgrade}"), "edge_token_missing"),
        ("/?edge_token=x", &cookie, "edge_token_invalid"),
    ] {
        let answer = ask(port, path, fields).await;
        assert_eq!(code(&answer).as_deref(), Some(expected), "{path} {fields}");
    }
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
    for _ in 0..2 {
        world.pause(&id).await.unwrap();
        let answer = ask(port, &format!("/p?a=1&edge_token={token}"), "").await;
        assert!(answer.contains("GET /p?a=1 HTTP/1.1"), "{answer}");
        assert!(
            !answer.split_once("\r\n\r\n").unwrap().1.contains(token.as_str()),
            "{answer}"
        );
        assert!(
            answer.contains(&format!("torpor_edge_{id}_80={token}; Path=/; Max-Age=")),
            "{answer}"
        );
    }
    let answer = ask(port, "/style.css", &format!("cookie: mine=1\r\n{cookie}")).await;
    assert!(
        answer.contains("cookie: mine=1\r\n") && !answer.contains("torpor_edge_"),
        "{answer}"
    );
    let answer = ask(port, "/", &format!("x-edge-token: {token}\r\n")).await;
    assert!(
        answer.contains("GET / HTTP/1.1") && !answer.contains(token.as_str()),
        "{answer}"
    );
    let grants = world.fleet.grants(&id, Some(80)).await.unwrap();
    let used = grants.iter().find(|grant| grant.id == issued.grant.id).unwrap();
    assert_eq!(
        (
            used.http_request_count,
            used.websocket_connection_count,
            used.use_count
        ),
        (4, 0, 4)
    );
    assert!(used.bytes_out_count > 100 && used.first_used_unix_ms.is_some());
}

#[tokio::test]
async fn a_token_ends_with_its_time_its_grant_its_scope_or_its_key() {
    let world = World::new();
    let (id, port, _proxy) = guarded(&world, ServiceAuth::Token).await;
    let other = world.create().await;
    let spec = ServiceSpec {
        name: None,
        port: 81,
        kind: ServiceKind::Http,
        auth: ServiceAuth::Token,
        wake_deadline_ms: None,
    };
    world.fleet.expose(&other, spec).await.unwrap();
    let foreign = world
        .fleet
        .issue_grant(&other, 81, CreateGrant::default())
        .await
        .unwrap();
    let path = |token: &str| format!("/?edge_token={token}");
    let answer = ask(port, &path(&foreign.token), "").await;
    assert_eq!(code(&answer).as_deref(), Some("edge_token_scope_mismatch"));

    let revoked = world
        .fleet
        .issue_grant(&id, 80, CreateGrant::default())
        .await
        .unwrap();
    assert!(
        ask(port, &path(&revoked.token), "")
            .await
            .starts_with("HTTP/1.1 200")
    );
    let grant = world.fleet.revoke_grant(&id, &revoked.grant.id).await.unwrap();
    assert_eq!(grant.status, GrantStatus::Revoked);
    let answer = ask(port, &path(&revoked.token), "").await;
    assert_eq!(code(&answer).as_deref(), Some("edge_token_invalid"));
    let unknown = world
        .fleet
        .revoke_grant(&other, &revoked.grant.id)
        .await
        .unwrap_err();
    assert_eq!(unknown.code, ErrorCode::GrantNotFound);

    let kept = world
        .fleet
        .issue_grant(&id, 80, CreateGrant::default())
        .await
        .unwrap();
    assert_eq!(world.fleet.rotate_edge_key(false).await.unwrap().keys.len(), 2);
    assert!(
        ask(port, &path(&kept.token), "")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert_eq!(world.fleet.rotate_edge_key(true).await.unwrap().keys.len(), 1);
    let answer = ask(port, &path(&kept.token), "").await;
    assert_eq!(code(&answer).as_deref(), Some("edge_token_invalid"));

    let late = world
        .fleet
        .issue_grant(&id, 80, CreateGrant::default())
        .await
        .unwrap();
    world.clock.advance(Duration::from_secs(3600));
    let answer = ask(port, &path(&late.token), "").await;
    assert_eq!(code(&answer).as_deref(), Some("edge_token_expired"));
}

#[tokio::test]
async fn a_service_with_an_api_key_takes_the_apis_token_alone_and_keeps_it_from_the_guest() {
    let world = World::new();
    let (_id, port, _proxy) = guarded(&world, ServiceAuth::ApiKey).await;
    let bearer = "authorization: Bearer secret\r\n";
    assert_eq!(
        code(&ask(port, "/", bearer).await).as_deref(),
        Some("unauthorized")
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token");
    std::fs::write(&path, "secret\n").unwrap();
    world
        .fleet
        .edge()
        .set_api_token(crate::api::Token::read(&path).unwrap());
    assert_eq!(code(&ask(port, "/", "").await).as_deref(), Some("unauthorized"));
    assert_eq!(
        code(&ask(port, "/", "authorization: Bearer other\r\n").await).as_deref(),
        Some("unauthorized")
    );
    let answer = ask(port, "/?edge_token=kept", bearer).await;
    assert!(
        answer.contains("GET /?edge_token=kept") && !answer.contains("secret"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_filtered_request_is_answered_while_the_machine_sleeps_and_passes_while_it_runs() {
    let world = World::new();
    let (id, port, _proxy) = guarded(&world, ServiceAuth::None).await;
    let filter = serde_json::json!({ "rules": [
        { "path": "/health", "answer": { "status": 200, "content_type": "text/plain", "body": "asleep" } },
        { "user_agent": "scanner", "answer": { "status": 403 } },
    ]});
    let filter = serde_json::from_value(filter).unwrap();
    world.fleet.set_wake_filter(&id, filter).await.unwrap();
    assert!(ask(port, "/health", "").await.contains("GET /health"));
    world.pause(&id).await.unwrap();
    let answer = ask(port, "/health?x", "").await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with("asleep"),
        "{answer}"
    );
    let answer = ask(port, "/", "user-agent: Mozilla Scanner\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    assert_eq!(world.status(&id).await, MachineStatus::Paused);
    assert!(ask(port, "/", "").await.contains("GET / HTTP/1.1"));
    assert!(world.fleet.usual_wake().is_some());
}

#[tokio::test]
async fn a_service_has_a_wake_deadline_of_its_own() {
    let world = World::new();
    let (id, port, _proxy) = guarded(&world, ServiceAuth::None).await;
    let patch = PatchService {
        wake_deadline_ms: Some(100),
        ..PatchService::default()
    };
    let service = world.fleet.patch_service(&id, "80", patch).await.unwrap();
    let route = crate::store::ServiceRoute {
        listen_port: port,
        ..crate::store::ServiceRoute::of(&id, &service)
    };
    world.fleet.routes().open(route).unwrap();
    world.pause(&id).await.unwrap();
    let hold = world
        .host
        .faults()
        .hold(crate::machine::simulated::Point::Restore);
    let answer = ask(port, "/", "").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(
        answer.contains("machine_resume_timeout") && answer.contains("retry-after: 5\r\n"),
        "{answer}"
    );
    hold.release();
}
