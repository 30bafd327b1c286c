//! Bad input: always a stable code, always the one shape, never a change.

use super::*;

#[tokio::test]
async fn bad_creates_are_refused_and_leave_nothing() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let many: Vec<Value> = (1..80).map(|port| json!({ "port": port })).collect();
    let pairs: serde_json::Map<String, Value> = (0..65).map(|n| (format!("k{n}"), json!("v"))).collect();
    for (body, code) in [
        (json!({ "unknown": 1 }), "invalid_request"),
        (json!({ "vcpus": 0 }), "invalid_request"),
        (json!({ "vcpus": 9 }), "invalid_request"),
        (json!({ "vcpus": -1 }), "invalid_request"),
        (json!({ "vcpus": "two" }), "invalid_request"),
        (json!({ "mem_mib": 127 }), "invalid_request"),
        (json!({ "mem_mib": 1u64 << 40 }), "invalid_request"),
        (json!({ "disk_mib": 1 }), "invalid_request"),
        (json!({ "name": "../../etc/passwd" }), "invalid_request"),
        (json!({ "name": "a".repeat(200) }), "invalid_request"),
        (json!({ "name": "" }), "invalid_request"),
        (json!({ "template": "no-such" }), "template_not_found"),
        (json!({ "template": "../base" }), "invalid_request"),
        (
            json!({ "lease": { "seconds": -5, "action": "pause" } }),
            "invalid_request",
        ),
        (
            json!({ "lease": { "seconds": 0, "action": "pause" } }),
            "invalid_request",
        ),
        (
            json!({ "lease": { "seconds": 10, "action": "explode" } }),
            "invalid_request",
        ),
        (
            json!({ "lease": { "seconds": 10, "action": "pause", "x": 1 } }),
            "invalid_request",
        ),
        (
            json!({ "lease": { "seconds": 10, "action": "destroy" }, "wake": { "http": true } }),
            "auto_resume_needs_pause",
        ),
        (json!({ "services": [{ "port": 0 }] }), "invalid_request"),
        (json!({ "services": [{ "port": 70000 }] }), "invalid_request"),
        (
            json!({ "services": [{ "port": 80 }, { "port": 80 }] }),
            "invalid_request",
        ),
        (json!({ "services": many }), "invalid_request"),
        (
            json!({ "metadata": { "k": "v".repeat(100_000) } }),
            "invalid_request",
        ),
        (json!({ "metadata": { "": "v" } }), "invalid_request"),
        (json!({ "metadata": pairs }), "invalid_request"),
    ] {
        let answer = call(&router, "POST", "/v1/machines", body.clone()).await;
        let status = if code == "template_not_found" { 404 } else { 400 };
        assert_refused(&answer, status, code, &body.to_string());
    }
    assert_eq!(
        call(&router, "GET", "/v1/machines", Value::Null).await.body,
        json!({ "machines": [] })
    );
    assert_eq!(world.host.n_boots(), 0);
}

#[tokio::test]
async fn every_bad_request_has_the_one_shape() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    let machine = format!("/v1/machines/{id}");
    let large = format!("{{\"metadata\":{{\"a\":\"{}\"}}}}", "x".repeat(2 << 20));
    let long_argv = json!({ "argv": ["x".repeat(300_000)] }).to_string();
    let cases: Vec<(&str, String, Vec<u8>, u16, &str)> = vec![
        (
            "POST",
            "/v1/machines".into(),
            b"{".to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            "/v1/machines".into(),
            b"[]".to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            "/v1/machines".into(),
            b"".to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            "/v1/machines".into(),
            b"\xff\xfe".to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            "/v1/machines".into(),
            large.into_bytes(),
            413,
            "body_too_large",
        ),
        (
            "GET",
            "/v1/machines/mch_nope".into(),
            vec![],
            404,
            "machine_not_found",
        ),
        (
            "GET",
            "/v1/machines/..%2f..%2fetc%2fpasswd".into(),
            vec![],
            404,
            "machine_not_found",
        ),
        ("GET", "/v1/machines/%ff".into(), vec![], 400, "invalid_request"),
        (
            "DELETE",
            "/v1/machines/%00".into(),
            vec![],
            404,
            "machine_not_found",
        ),
        ("GET", "/v1/no/such/route".into(), vec![], 404, "route_not_found"),
        ("GET", "/".into(), vec![], 404, "route_not_found"),
        ("PUT", "/v1/machines".into(), vec![], 405, "method_not_allowed"),
        ("POST", machine.clone(), vec![], 405, "method_not_allowed"),
        (
            "GET",
            "/v1/machines?limit=-1".into(),
            vec![],
            400,
            "invalid_request",
        ),
        (
            "GET",
            "/v1/machines?limit=0".into(),
            vec![],
            400,
            "invalid_request",
        ),
        (
            "GET",
            "/v1/machines?limit=1001".into(),
            vec![],
            400,
            "invalid_request",
        ),
        (
            "GET",
            "/v1/machines?page=1".into(),
            vec![],
            400,
            "invalid_request",
        ),
        (
            "GET",
            "/v1/machines?after=x".into(),
            vec![],
            400,
            "invalid_request",
        ),
        (
            "GET",
            "/v1/events?after=-1".into(),
            vec![],
            400,
            "invalid_request",
        ),
        (
            "GET",
            format!("{machine}/logs?bytes=0"),
            vec![],
            400,
            "invalid_request",
        ),
        (
            "PUT",
            format!("{machine}/lease"),
            b"{}x".to_vec(),
            400,
            "invalid_request",
        ),
        (
            "PUT",
            format!("{machine}/lease"),
            br#"{"lease":{"seconds":1e99,"action":"pause"}}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "PUT",
            format!("{machine}/lease"),
            br#"{"lease":{"seconds":31622401,"action":"pause"}}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "PUT",
            format!("{machine}/lease"),
            br#"{"lease":{"seconds":5,"action":"destroy"}}"#.to_vec(),
            400,
            "auto_resume_needs_pause",
        ),
        (
            "PATCH",
            format!("{machine}/wake"),
            br#"{"http":1}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/services"),
            br#"{"port":0}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/services"),
            br#"{"port":1,"name":"A"}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "DELETE",
            format!("{machine}/services/no-such"),
            vec![],
            404,
            "service_not_found",
        ),
        (
            "POST",
            format!("{machine}/pause"),
            br#"{"x":1}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/resume"),
            br#"{"from":"moon"}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/resume"),
            br#"{"from":"disk"}"#.to_vec(),
            409,
            "machine_not_ready",
        ),
        (
            "POST",
            format!("{machine}/exec"),
            b"{}".to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/exec"),
            br#"{"argv":["a"],"shell":"b"}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/exec"),
            br#"{"argv":["a"],"bogus":1}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/exec"),
            br#"{"argv":["a\u0000b"]}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/exec"),
            br#"{"argv":["a"],"cwd":"../x"}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/exec"),
            br#"{"argv":["a"],"timeout_ms":0}"#.to_vec(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/exec"),
            long_argv.into_bytes(),
            400,
            "invalid_request",
        ),
        (
            "POST",
            format!("{machine}/exec"),
            br#"{"argv":["no-such-program"]}"#.to_vec(),
            502,
            "exec_failed",
        ),
    ];
    for (method, path, body, status, code) in cases {
        let what = format!("{method} {path}");
        assert_refused(
            &send(&router, method, &path, body, &[]).await,
            status,
            code,
            &what,
        );
    }
    let form = [("content-type", "application/x-www-form-urlencoded")];
    assert_refused(
        &send(&router, "POST", "/v1/machines", "{}", &form).await,
        400,
        "invalid_request",
        "form",
    );
    for key in ["", "a b", "\t"] {
        let utf8 = [
            ("content-type", "application/json; charset=utf-8"),
            ("idempotency-key", key),
        ];
        assert_refused(
            &send(&router, "POST", "/v1/machines", "{}", &utf8).await,
            400,
            "invalid_request",
            key,
        );
    }
    assert_eq!(
        call(&router, "GET", &machine, Value::Null).await.body["status"],
        "running"
    );
}

#[tokio::test]
async fn a_wrong_method_is_told_the_right_ones() {
    let world = World::new();
    let answer = call(&router(world.fleet.clone()), "PUT", "/v1/machines", Value::Null).await;
    assert!(
        answer.headers["allow"].to_str().unwrap().contains("POST"),
        "{:?}",
        answer.headers
    );
}

#[tokio::test]
async fn tcp_needs_the_token_and_an_empty_one_is_none() {
    let world = World::new();
    let path = world.directory.path().join("token");
    std::fs::write(&path, " \n").unwrap();
    assert!(matches!(Token::read(&path), Err(TokenError::Empty { .. })));
    std::fs::write(&path, "right\n").unwrap();
    let router = router_with_token(world.fleet.clone(), Token::read(&path).unwrap());
    for wrong in [
        "Bearer wrong",
        "Bearer ",
        "Bearer",
        "Basic right",
        "right",
        "bearer right",
    ] {
        let answer = send(
            &router,
            "GET",
            "/v1/machines",
            Body::empty(),
            &[("authorization", wrong)],
        )
        .await;
        assert_refused(&answer, 401, "unauthorized", wrong);
    }
    assert_refused(
        &call(&router, "GET", "/v1/no/route", Value::Null).await,
        401,
        "unauthorized",
        "no header",
    );
    let right = [("authorization", "Bearer right")];
    assert_eq!(
        send(&router, "GET", "/v1/machines", Body::empty(), &right)
            .await
            .status,
        StatusCode::OK
    );
    assert_eq!(
        call(&router, "GET", "/v1/healthz", Value::Null).await.status,
        StatusCode::OK
    );
}
