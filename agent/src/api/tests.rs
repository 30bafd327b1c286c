//! The real router over a real store, real drivers and a simulated host.

mod events;
pub(super) mod facade;
mod refusals;
mod sdk_docs;
mod ssh;

use super::*;
use crate::machine::simulated::{Fault, Point};
use crate::machine::tests::World;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use torpor_api::ErrorCode;
use tower::ServiceExt;

pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: axum::http::HeaderMap,
    pub(super) body: Value,
}

async fn read(response: Response<Body>) -> Answer {
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let body = serde_json::from_slice(&bytes)
        .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
    Answer {
        status: parts.status,
        headers: parts.headers,
        body,
    }
}

pub(super) async fn send(
    router: &Router,
    method: &str,
    path: &str,
    body: impl Into<Body>,
    headers: &[(&str, &str)],
) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    read(
        router
            .clone()
            .oneshot(request.body(body.into()).unwrap())
            .await
            .unwrap(),
    )
    .await
}

async fn call(router: &Router, method: &str, path: &str, body: Value) -> Answer {
    let body = if body.is_null() {
        Body::empty()
    } else {
        Body::from(body.to_string())
    };
    send(router, method, path, body, &[]).await
}

fn assert_refused(answer: &Answer, status: u16, code: &str, what: &str) {
    assert_eq!(answer.body["code"], code, "{what}: {}", answer.body);
    assert_eq!(answer.status, status, "{what}: {}", answer.body);
    let mut keys: Vec<_> = answer
        .body
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    assert_eq!(
        keys,
        ["code", "error", "request_id", "retryable", "suggested_action"],
        "{what}"
    );
    assert_eq!(
        answer.headers["x-request-id"].to_str().unwrap(),
        answer.body["request_id"].as_str().unwrap()
    );
    assert_eq!(answer.headers["content-type"], "application/json", "{what}");
    assert!(!answer.body["error"].as_str().unwrap().is_empty(), "{what}");
}

async fn created(router: &Router) -> (String, Value) {
    let answer = call(router, "POST", "/v1/machines", json!({})).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
    (answer.body["id"].as_str().unwrap().to_owned(), answer.body)
}

#[tokio::test]
async fn a_machine_lives_through_the_api() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let body = json!({ "name": "web", "services": [{ "port": 8080 }], "metadata": { "team": "blue" } });
    let machine = call(&router, "POST", "/v1/machines", body).await;
    assert_eq!(machine.status, StatusCode::CREATED, "{}", machine.body);
    assert_eq!(
        (&machine.body["status"], &machine.body["name"]),
        (&json!("running"), &json!("web"))
    );
    assert_eq!(machine.body["services"][0]["url"], "http://127.0.0.1:20000");
    let exec = |program| json!({ "argv": [program] });
    assert_eq!(
        call(&router, "POST", "/v1/machines/web/exec", exec("count"))
            .await
            .body["stdout"],
        "1"
    );
    let paused = call(&router, "POST", "/v1/machines/web/pause", Value::Null).await;
    assert_eq!(
        (paused.status, &paused.body["status"]),
        (StatusCode::OK, &json!("paused"))
    );
    let alias = machine.body["execution_id"].as_str().unwrap();
    let by_alias = call(&router, "GET", &format!("/v1/machines/{alias}"), Value::Null).await;
    assert_eq!(
        (&by_alias.body["id"], &by_alias.body["status"]),
        (&machine.body["id"], &json!("paused"))
    );
    assert_eq!(
        call(&router, "POST", "/v1/machines/web/exec", exec("count"))
            .await
            .body["stdout"],
        "2"
    );
    let resumed = call(&router, "POST", "/v1/machines/web/resume", Value::Null).await;
    assert_eq!(resumed.body["wakes"], 1);
    assert_ne!(resumed.body["execution_id"], machine.body["execution_id"]);
    let events = call(&router, "GET", "/v1/machines/web/events", Value::Null)
        .await
        .body;
    let kinds: Vec<_> = events["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["kind"].clone())
        .collect();
    assert_eq!(
        kinds,
        [
            "machine.created",
            "machine.started",
            "machine.paused",
            "machine.woken"
        ]
    );
    assert_eq!(events["events"][3]["detail"]["cause"]["operation"], "exec");
    assert_eq!(events["events"][3]["detail"]["stages"]["resynced_us"], 1200);
    assert_eq!(
        call(&router, "DELETE", "/v1/machines/web", Value::Null)
            .await
            .status,
        StatusCode::NO_CONTENT
    );
    let gone = call(&router, "GET", &format!("/v1/machines/{alias}"), Value::Null).await;
    assert_refused(&gone, 404, "machine_not_found", "alias of a deleted machine");
}

#[tokio::test]
async fn reads_never_wake() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    call(&router, "POST", &format!("/v1/machines/{id}/pause"), Value::Null).await;
    for path in ["", "/lease", "/services", "/logs?bytes=1000", "/events"] {
        let answer = call(&router, "GET", &format!("/v1/machines/{id}{path}"), Value::Null).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}");
    }
    for path in ["/v1/machines", "/v1/events", "/v1/templates"] {
        assert_eq!(
            call(&router, "GET", path, Value::Null).await.status,
            StatusCode::OK,
            "{path}"
        );
    }
    let health = call(&router, "GET", "/v1/healthz", Value::Null).await.body;
    assert_eq!(
        (&health["status"], &health["machines"]["paused"]),
        (&json!("ok"), &json!(1))
    );
    assert_eq!(health["pools"]["slots"]["ready"], json!(0));
    assert_eq!(world.host.n_restores(), 0);
}

#[tokio::test]
async fn metrics_tell_of_wakes_and_pauses_and_of_what_there_is() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let id = world.create().await;
    let metrics = async || {
        let answer = call(&router, "GET", "/v1/metrics", Value::Null).await;
        let content_type = answer.headers["content-type"].to_str().unwrap();
        assert!(
            content_type.starts_with("application/openmetrics-text"),
            "{content_type}"
        );
        answer.body.as_str().unwrap().to_owned()
    };
    let before = metrics().await;
    assert!(
        before.contains("torpor_machines{status=\"running\"} 1\n"),
        "{before}"
    );
    assert!(before.contains("torpor_freeze_seconds_count 0\n"), "{before}");
    assert!(before.ends_with("# EOF\n"), "{before}");

    world
        .host
        .faults()
        .at(Point::Persist, Fault::Fail(ErrorCode::DiskFull));
    assert!(world.pause(&id).await.is_err());
    world.pause(&id).await.unwrap();
    world
        .host
        .faults()
        .at(Point::Restore, Fault::Fail(ErrorCode::ResumeFailed));
    assert!(world.touch(&id).await.is_err());
    world.touch(&id).await.unwrap();
    let after = metrics().await;
    for line in [
        "torpor_wake_seconds_count{from=\"image\"} 1",
        "torpor_wake_stage_seconds_count{stage=\"resynced\"} 1",
        "torpor_wake_failures_total{code=\"machine_resume_failed\"} 1",
        "torpor_freeze_seconds_count 1",
        "torpor_pause_durable_seconds_count 1",
        "torpor_image_written_bytes_total 40960",
        "torpor_pause_failures_total{code=\"disk_full\"} 1",
    ] {
        assert!(
            after.lines().any(|found| found == line),
            "{line} is not in {after}"
        );
    }
}

#[tokio::test]
async fn the_same_key_makes_one_machine() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let key = [("idempotency-key", "k1")];
    let first = send(&router, "POST", "/v1/machines", r#"{"vcpus":1}"#, &key).await;
    let again = send(&router, "POST", "/v1/machines", r#"{"vcpus":1}"#, &key).await;
    assert_eq!(
        (again.status, &again.body["id"]),
        (StatusCode::CREATED, &first.body["id"])
    );
    let other = send(&router, "POST", "/v1/machines", r#"{"vcpus":2}"#, &key).await;
    assert_refused(&other, 409, "idempotency_conflict", "another body");
    assert_eq!(world.host.n_boots(), 1);
}

#[tokio::test]
async fn failures_of_machines_keep_their_codes() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    world
        .host
        .faults()
        .at(Point::Persist, Fault::Fail(torpor_api::ErrorCode::DiskFull));
    let answer = call(&router, "POST", &format!("/v1/machines/{id}/pause"), Value::Null).await;
    assert_refused(&answer, 507, "disk_full", "pause");
    let shown = call(&router, "GET", &format!("/v1/machines/{id}"), Value::Null)
        .await
        .body;
    assert_eq!(
        (&shown["status"], &shown["last_error"]["code"]),
        (&json!("running"), &json!("disk_full"))
    );
    let off = json!({ "http": false, "ssh": false, "tcp": false, "api": false });
    call(&router, "PATCH", &format!("/v1/machines/{id}/wake"), off).await;
    call(&router, "POST", &format!("/v1/machines/{id}/pause"), Value::Null).await;
    let answer = call(
        &router,
        "POST",
        &format!("/v1/machines/{id}/exec"),
        json!({ "argv": ["count"] }),
    )
    .await;
    assert_refused(&answer, 503, "machine_paused_auto_resume_disabled", "exec");
    assert_eq!(
        (&answer.body["retryable"], &answer.headers["retry-after"]),
        (&json!(false), &"5".parse().unwrap())
    );
}

#[tokio::test]
async fn leases_and_services_are_echoed_whole() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    let machine = format!("/v1/machines/{id}");
    assert_eq!(
        call(&router, "GET", &format!("{machine}/lease"), Value::Null)
            .await
            .body,
        Value::Null
    );
    let set = json!({ "lease": { "seconds": 60, "action": "pause", "mode": "sliding" } });
    let lease = call(&router, "PUT", &format!("{machine}/lease"), set).await.body;
    assert_eq!(
        (&lease["remaining_ms"], &lease["mode"]),
        (&json!(60_000), &json!("sliding"))
    );
    assert_eq!(
        call(
            &router,
            "PUT",
            &format!("{machine}/lease"),
            json!({ "lease": null })
        )
        .await
        .body,
        Value::Null
    );
    let service = call(
        &router,
        "POST",
        &format!("{machine}/services"),
        json!({ "port": 22, "kind": "tcp" }),
    )
    .await;
    assert_eq!(
        (service.status, &service.body["url"]),
        (StatusCode::CREATED, &json!("tcp://127.0.0.1:20000"))
    );
    let taken = json!({ "port": 23, "name": "port-22" });
    let answer = call(&router, "POST", &format!("{machine}/services"), taken).await;
    assert_refused(&answer, 409, "name_conflict", "service");
    let removed = call(
        &router,
        "DELETE",
        &format!("{machine}/services/port-22"),
        Value::Null,
    )
    .await;
    assert_eq!(removed.status, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn destroying_and_waking_exclude_each_other_on_every_later_change() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    let machine = format!("/v1/machines/{id}");
    let destroy = json!({ "lease": { "seconds": 60, "action": "destroy" } });
    let on = json!({ "http": true });
    let off = json!({ "http": false, "ssh": false, "tcp": false, "api": false });
    for paused in [false, true] {
        if paused {
            world.pause(&id.parse().unwrap()).await.unwrap();
        }
        let answer = call(&router, "PUT", &format!("{machine}/lease"), destroy.clone()).await;
        assert_refused(&answer, 400, "auto_resume_needs_pause", "exclude each other");
        let turned_off = call(&router, "PATCH", &format!("{machine}/wake"), off.clone()).await;
        assert_eq!(turned_off.status, StatusCode::OK);
        let set = call(&router, "PUT", &format!("{machine}/lease"), destroy.clone()).await;
        assert_eq!(set.body["action"], "destroy");
        let answer = call(&router, "PATCH", &format!("{machine}/wake"), on.clone()).await;
        assert_refused(&answer, 400, "auto_resume_needs_pause", "exclude each other");
        let fork = json!({ "wake": { "http": true } });
        let answer = call(&router, "POST", &format!("{machine}/fork"), fork).await;
        assert_refused(&answer, 400, "auto_resume_needs_pause", "exclude each other");
        let gone = call(
            &router,
            "PUT",
            &format!("{machine}/lease"),
            json!({ "lease": null }),
        )
        .await;
        assert_eq!(gone.status, StatusCode::OK);
        let turned_on = call(&router, "PATCH", &format!("{machine}/wake"), on.clone()).await;
        assert_eq!(turned_on.body["wake"]["http"], true);
    }
}

#[tokio::test]
async fn a_retention_is_echoed_and_bounded() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    let path = format!("/v1/machines/{id}/retention");
    let shown = call(&router, "GET", &path, Value::Null).await;
    assert_eq!(shown.body, Value::Null);
    let set = call(&router, "PUT", &path, json!({ "retention_seconds": 60 })).await;
    assert_eq!(set.body, json!({ "seconds": 60 }), "no end while it is awake");
    world.pause(&id.parse().unwrap()).await.unwrap();
    let shown = call(&router, "GET", &path, Value::Null).await;
    assert_eq!(shown.body["remaining_ms"], 60_000);
    for (bad, says) in [
        (json!({ "retention_seconds": 0 }), "retention_seconds is 0"),
        (json!({ "retention_seconds": 315_360_001 }), "has to be 1 to"),
        (json!({ "seconds": 60 }), "seconds"),
        (json!({ "retention_seconds": -1 }), "retention_seconds"),
    ] {
        let answer = call(&router, "PUT", &path, bad).await;
        assert_refused(&answer, 400, "invalid_request", says);
    }
    let answer = call(&router, "POST", "/v1/machines", json!({ "retention_seconds": 0 })).await;
    assert_refused(&answer, 400, "invalid_request", "retention_seconds is 0");
}

#[tokio::test]
async fn what_counts_as_activity_is_changed_field_by_field_and_bounded() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    let path = format!("/v1/machines/{id}/activity");
    let patch = json!({ "cpu": false, "min_awake_seconds": 30 });
    assert_eq!(call(&router, "PATCH", &path, patch).await.status, StatusCode::OK);
    let shown = call(&router, "GET", &path, Value::Null).await.body;
    assert_eq!(
        shown,
        json!({ "proxy": true, "sessions": true, "outbound": true, "cpu": false, "hold": true,
                "cpu_floor_percent": 25, "min_awake_seconds": 30 })
    );
    world.touch(&id.parse().unwrap()).await.unwrap();
    let why = call(&router, "GET", &format!("/v1/machines/{id}/why"), Value::Null).await;
    assert_eq!(why.body["because"], "booted by api");
    let sources = why.body["activity"].as_array().unwrap();
    let counts = |source: &str| {
        sources
            .iter()
            .find(|sign| sign["source"] == source)
            .map(|sign| &sign["counts"])
    };
    assert_eq!(counts("proxy"), Some(&json!(true)));
    assert_eq!(why.body["min_awake_remaining_ms"], 30_000);
    for (bad, says) in [
        (json!({ "cpu_floor_percent": 0 }), "cpu_floor_percent is 0"),
        (
            json!({ "min_awake_seconds": 86_401 }),
            "min_awake_seconds is 86401",
        ),
        (json!({ "disk": true }), "disk"),
        (json!({ "cpu": "off" }), "cpu"),
    ] {
        let answer = call(&router, "PATCH", &path, bad.clone()).await;
        assert_refused(&answer, 400, "invalid_request", says);
        let answer = call(&router, "POST", "/v1/machines", json!({ "activity": bad })).await;
        assert_refused(&answer, 400, "invalid_request", says);
    }
}

#[tokio::test]
async fn machines_are_listed_in_pages() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(json!(created(&router).await.0));
    }
    let page = call(&router, "GET", "/v1/machines?limit=2", Value::Null)
        .await
        .body;
    assert_eq!((&page["machines"][1]["id"], &page["next"]), (&ids[1], &ids[1]));
    let path = format!("/v1/machines?limit=2&after={}", page["next"].as_str().unwrap());
    let last = call(&router, "GET", &path, Value::Null).await.body;
    assert_eq!(
        (&last["machines"][0]["id"], &last["next"]),
        (&ids[2], &Value::Null)
    );
}

#[tokio::test]
async fn lists_can_be_narrowed_and_metadata_replaced() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let body = json!({ "metadata": { "team": "a" }, "env": { "A": "1" }, "cwd": "/srv" });
    let first = call(&router, "POST", "/v1/machines", body).await.body;
    assert_eq!((&first["env"]["A"], &first["cwd"]), (&json!("1"), &json!("/srv")));
    let (second, _) = created(&router).await;
    call(
        &router,
        "POST",
        &format!("/v1/machines/{second}/pause"),
        Value::Null,
    )
    .await;
    for (query, found) in [
        ("status=paused", &second),
        ("status=running,waking", &first["id"].as_str().unwrap().to_owned()),
        (
            "metadata=%7B%22team%22%3A%22a%22%7D",
            &first["id"].as_str().unwrap().to_owned(),
        ),
    ] {
        let list = call(&router, "GET", &format!("/v1/machines?{query}"), Value::Null)
            .await
            .body;
        let ids: Vec<_> = list["machines"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| m["id"].clone())
            .collect();
        assert_eq!(ids, [json!(found)], "{query}");
    }
    for query in ["status=asleep", "metadata=x", "metadata=%7B%22a%22%3A1%7D"] {
        let answer = call(&router, "GET", &format!("/v1/machines?{query}"), Value::Null).await;
        assert_refused(&answer, 400, "invalid_request", query);
    }
    let path = format!("/v1/machines/{second}/metadata");
    let changed = call(&router, "PUT", &path, json!({ "metadata": { "b": "2" } }))
        .await
        .body;
    assert_eq!(
        (&changed["metadata"], &changed["status"]),
        (&json!({ "b": "2" }), &json!("paused"))
    );
}

#[tokio::test]
async fn the_unix_socket_is_for_its_owner_alone_and_replaces_a_dead_one() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("api.sock");
    drop(bind_unix(&path).unwrap());
    let _listener = bind_unix(&path).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
}
