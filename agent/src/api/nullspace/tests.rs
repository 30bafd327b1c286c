//! The Nullspace API over a real store, real drivers and a simulated host.

mod files;
mod lifecycle;
mod processes;
mod snapshots;

use super::*;
use crate::api::tests::facade::{call, token};
use crate::api::tests::send;
use crate::machine::fleet::Settings;
use crate::machine::tests::World;
use axum::http::StatusCode;
use serde_json::{Value, json};
use std::time::Duration;

fn served(world: &World) -> Router {
    router(world.fleet.clone(), token(world))
}

/// The body that the SDK sends for `Machine.create()`.
fn plain() -> Value {
    json!({
        "template": "base", "vcpus": 2, "memory_mb": 512, "timeout_ms": 600_000, "auto_resume": false, "envs": {},
        "metadata": {}, "internet_access": true, "cwd": null, "desktop": null, "network": null, "volumes": null
    })
}

fn resuming() -> Value {
    let mut body = plain();
    body["auto_resume"] = json!(true);
    body["lifecycle"] = json!({ "on_timeout": "pause" });
    body
}

async fn created(router: &Router, body: Value) -> Value {
    let answer = call(router, "POST", "/v1/machines", body).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
    answer.body
}

/// The same; its ID.
async fn created_id(router: &Router, body: Value) -> String {
    created(router, body).await["id"].as_str().unwrap().to_owned()
}

fn no_nulls(value: &Value) -> bool {
    value
        .as_object()
        .is_none_or(|object| object.values().all(|value| !value.is_null() && no_nulls(value)))
}

#[tokio::test]
async fn every_resume_brings_a_new_id_and_every_old_one_leads_to_the_machine() {
    let world = World::new();
    let router = served(&world);
    let first = created(&router, resuming()).await;
    assert!(no_nulls(&first), "{first}");
    assert_eq!(
        (
            &first["status"],
            &first["timeout_action"],
            &first["timeout_ms"],
            &first["config"]["memory_mb"]
        ),
        (
            &json!("running"),
            &json!("hibernate"),
            &json!(600_000),
            &json!(512)
        )
    );
    let mut ids = vec![first["id"].as_str().unwrap().to_owned()];
    for _ in 0..3 {
        let old = ids.last().unwrap().clone();
        let snapshot = call(
            &router,
            "POST",
            &format!("/v1/machines/{old}/hibernate"),
            Value::Null,
        )
        .await;
        assert_eq!(snapshot.status, StatusCode::OK, "{}", snapshot.body);
        let mut keys: Vec<_> = snapshot.body.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        assert_eq!(keys, ["created_at", "id", "machine_id", "size_bytes"]);
        assert_eq!(snapshot.body["machine_id"], json!(old));
        let paused = call(&router, "GET", &format!("/v1/machines/{}", ids[0]), Value::Null)
            .await
            .body;
        assert_eq!(
            (&paused["status"], &paused["snapshot_id"], &paused["id"]),
            (&json!("paused"), &snapshot.body["id"], &json!(old))
        );
        let resumed = call(
            &router,
            "POST",
            &format!("/v1/machines/{}/resume", ids[0]),
            Value::Null,
        )
        .await
        .body;
        assert_eq!(
            (&resumed["status"], resumed.get("snapshot_id")),
            (&json!("running"), None)
        );
        let new = resumed["id"].as_str().unwrap().to_owned();
        assert!(!ids.contains(&new), "{new} was there before");
        ids.push(new);
    }
    for id in &ids {
        let shown = call(&router, "GET", &format!("/v1/machines/{id}"), Value::Null)
            .await
            .body;
        assert_eq!(shown["id"], json!(ids.last().unwrap()), "{id}");
    }
    let list = call(&router, "GET", "/v1/machines", Value::Null).await.body;
    assert_eq!(
        (list["items"].as_array().unwrap().len(), &list["has_next"]),
        (1, &json!(false))
    );
    call(
        &router,
        "DELETE",
        &format!("/v1/machines/{}", ids[1]),
        Value::Null,
    )
    .await;
    for id in &ids {
        let gone = call(&router, "GET", &format!("/v1/machines/{id}"), Value::Null).await;
        assert_eq!(
            (gone.status, &gone.body["code"]),
            (StatusCode::NOT_FOUND, &json!("machine_not_found"))
        );
    }
}

#[tokio::test]
async fn exec_wakes_if_auto_resume_says_so() {
    let world = World::new();
    let router = served(&world);
    for (body, status) in [(plain(), StatusCode::CONFLICT), (resuming(), StatusCode::OK)] {
        let id = created(&router, body).await["id"].as_str().unwrap().to_owned();
        let exec = || json!({ "command": "count", "timeout_secs": 30, "background": false });
        let done = call(&router, "POST", &format!("/v1/machines/{id}/exec"), exec())
            .await
            .body;
        assert_eq!(
            (&done["exit_code"], &done["stdout"], &done["stderr"]),
            (&json!(0), &json!("1"), &json!(""))
        );
        call(
            &router,
            "POST",
            &format!("/v1/machines/{id}/hibernate"),
            Value::Null,
        )
        .await;
        let answer = call(&router, "POST", &format!("/v1/machines/{id}/exec"), exec()).await;
        assert_eq!(answer.status, status, "{}", answer.body);
        if status == StatusCode::CONFLICT {
            assert_eq!(answer.body["code"], "machine_not_ready");
            let retry_after = answer.headers.get("retry-after");
            assert_eq!(retry_after, None, "waiting changes nothing");
        }
    }
}

#[tokio::test]
async fn a_full_host_says_so_in_the_sdks_words() {
    let world = World::with(Settings {
        max_running_mem_mib: 700,
        wake_timeout: Duration::from_millis(50),
        ..Settings::default()
    });
    let router = served(&world);
    created(&router, plain()).await;
    let full = call(&router, "POST", "/v1/machines", plain()).await;
    assert_eq!(
        (full.status, &full.body["code"], &full.body["retryable"]),
        (
            StatusCode::SERVICE_UNAVAILABLE,
            &json!("capacity_exceeded"),
            &json!(true)
        )
    );
    assert!(full.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn timeouts_and_auto_resume_go_together_or_are_refused() {
    let world = World::new();
    let router = served(&world);
    for (key, value) in [
        ("auto_resume", json!(true)),
        ("internet_access", json!(false)),
        ("volumes", json!([{ "ref": "v", "mount_path": "/v" }])),
        ("timeout_ms", json!(0)),
        ("colour", json!("red")),
    ] {
        let mut body = plain();
        body[key] = value;
        let answer = call(&router, "POST", "/v1/machines", body).await;
        let code = match key {
            "internet_access" | "volumes" => "not_implemented",
            _ => "invalid_request",
        };
        assert_eq!(answer.body["code"], code, "{key}: {}", answer.body);
    }
    let mut body = plain();
    body["ephemeral"] = json!(true);
    body["metadata"] = json!({ "k": "v" });
    let ephemeral = created(&router, body).await;
    assert_eq!(
        (&ephemeral["ephemeral"], &ephemeral["metadata"]),
        (&json!(true), &json!({ "k": "v" }))
    );
    assert_eq!(created(&router, plain()).await["ephemeral"], json!(false));
    let mut body = resuming();
    body["volumes"] = json!([]);
    let id = created_id(&router, body).await;
    let path = format!("/v1/machines/{id}/timeout");
    let lease = call(&router, "POST", &path, json!({ "timeout_ms": 1500 }))
        .await
        .body;
    assert_eq!(
        (
            &lease["timeout_ms"],
            &lease["timeout_action"],
            &lease["remaining_ms"]
        ),
        (&json!(2000), &json!("hibernate"), &json!(2000))
    );
    assert_eq!(lease["timeout_at"], "2023-11-14T22:13:22.000Z");
    let body = json!({ "timeout_ms": 1500, "timeout_action": "destroy" });
    let refused = call(&router, "POST", &path, body).await;
    assert_eq!(
        (refused.status, &refused.body["code"]),
        (StatusCode::BAD_REQUEST, &json!("invalid_request"))
    );
}

#[tokio::test]
async fn lists_are_narrowed_paged_and_cut_to_fields() {
    let world = World::new();
    let router = served(&world);
    for user in [1, 2, 1] {
        let mut body = plain();
        body["metadata"] = json!({ "user": user, "tags": ["x"] });
        created(&router, body).await;
    }
    let id = created(&router, plain()).await["id"].as_str().unwrap().to_owned();
    call(
        &router,
        "POST",
        &format!("/v1/machines/{id}/hibernate"),
        Value::Null,
    )
    .await;
    for (query, found) in [
        ("", 4),
        ("?state=paused", 1),
        ("?state=running", 3),
        ("?state=running,paused", 4),
        ("?state=destroyed", 0),
        ("?template=base&metadata=%7B%22user%22%3A1%7D", 2),
        ("?template=other", 0),
        ("?limit=2", 2),
    ] {
        let list = call(&router, "GET", &format!("/v1/machines{query}"), Value::Null)
            .await
            .body;
        assert_eq!(list["items"].as_array().unwrap().len(), found, "{query}: {list}");
    }
    let list = call(
        &router,
        "GET",
        "/v1/machines?limit=2&fields=id,metadata",
        Value::Null,
    )
    .await
    .body;
    assert_eq!(list["items"][0]["metadata"], json!({ "user": 1, "tags": ["x"] }));
    assert_eq!(list["items"][0].as_object().unwrap().len(), 2);
    let next = list["next_token"].as_str().unwrap();
    let rest = call(
        &router,
        "GET",
        &format!("/v1/machines?limit=2&next_token={next}"),
        Value::Null,
    )
    .await
    .body;
    assert_eq!(
        (rest["items"].as_array().unwrap().len(), &rest["has_next"]),
        (2, &json!(false))
    );
}

#[tokio::test]
async fn a_port_keeps_its_url_over_resumes() {
    let world = World::new();
    let router = served(&world);
    let id = created_id(&router, resuming()).await;
    let path = format!("/v1/machines/{id}/host");
    let host = call(&router, "POST", &path, json!({ "port": 8080 })).await.body;
    assert!(
        host["url"].as_str().unwrap().starts_with("http://127.0.0.1:"),
        "{host}"
    );
    assert!(
        host["websocket_url"]
            .as_str()
            .unwrap()
            .starts_with("ws://127.0.0.1:"),
        "{host}"
    );
    call(
        &router,
        "POST",
        &format!("/v1/machines/{id}/hibernate"),
        Value::Null,
    )
    .await;
    call(&router, "POST", &format!("/v1/machines/{id}/resume"), Value::Null).await;
    let again = call(&router, "POST", &path, json!({ "port": 8080 })).await.body;
    assert_eq!(again["host"], host["host"]);
    assert!(host["url"].as_str().unwrap().contains("/?edge_token="), "{host}");
    let machine = format!("/v1/machines/{id}");
    let body = json!({ "expires_in_seconds": 120 });
    let signed = call(
        &router,
        "POST",
        &format!("{machine}/ports/8080/signed-preview-url"),
        body,
    )
    .await
    .body;
    assert_eq!(signed["grant"]["expires_at"], "2023-11-14T22:15:20.000Z");
    let shown = call(
        &router,
        "GET",
        &format!("{machine}/ports/8080/preview-url"),
        Value::Null,
    )
    .await
    .body;
    assert_eq!(
        shown["grant"]["token_kinds"],
        json!(["http_port", "websocket_port"])
    );
    let grant = signed["grant"]["id"].as_str().unwrap();
    let revoked = call(
        &router,
        "DELETE",
        &format!("{machine}/preview-urls/{grant}"),
        Value::Null,
    )
    .await
    .body;
    assert_eq!(
        (&revoked["success"], &revoked["grant"]["status"]),
        (&json!(true), &json!("revoked"))
    );
    let list = call(
        &router,
        "GET",
        &format!("{machine}/preview-urls?port=8080"),
        Value::Null,
    )
    .await
    .body;
    assert_eq!(list["items"].as_array().unwrap().len(), 4);
    let missing = call(
        &router,
        "DELETE",
        &format!("{machine}/preview-urls/pvg_x"),
        Value::Null,
    )
    .await;
    assert_eq!(missing.body["code"], "preview_grant_not_found");
}

#[tokio::test]
async fn a_port_is_ready_when_something_answers_and_nobody_is_woken_to_find_out() {
    let world = World::new();
    let router = served(&world);
    let id = created_id(&router, plain()).await;
    let path = format!("/v1/machines/{id}/ports/8080/readiness");
    let probe = || json!({ "kind": "tcp", "timeout_secs": 1, "interval_ms": 60 });
    let unready = call(&router, "POST", &path, probe()).await.body;
    assert_eq!(
        (&unready["ready"], &unready["route_ready"], &unready["code"]),
        (&json!(false), &json!(true), &json!("preview_service_not_ready"))
    );
    assert!(unready["attempts"].as_u64().unwrap() > 2, "{unready}");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.host.serve(8080, listener.local_addr().unwrap());
    let ready = call(&router, "POST", &path, probe()).await.body;
    assert_eq!((&ready["ready"], &ready["attempts"]), (&json!(true), &json!(1)));
    call(
        &router,
        "POST",
        &format!("/v1/machines/{id}/hibernate"),
        Value::Null,
    )
    .await;
    let asleep = call(&router, "POST", &path, probe()).await.body;
    assert_eq!(
        (&asleep["ready"], &asleep["route_ready"], &asleep["code"]),
        (
            &json!(false),
            &json!(false),
            &json!("machine_paused_auto_resume_disabled")
        )
    );
    assert_eq!(world.host.n_restores(), 0);
}

#[tokio::test]
async fn what_is_not_built_says_so_and_a_wrong_key_is_refused() {
    let world = World::new();
    let router = served(&world);
    for (method, path) in unbuilt::ROUTES {
        let answer = call(&router, method, &path.replace(['{', '}', '*'], ""), Value::Null).await;
        assert_eq!(
            (answer.status, &answer.body["code"]),
            (StatusCode::NOT_IMPLEMENTED, &json!("not_implemented")),
            "{method} {path}"
        );
    }
    let answer = send(
        &router,
        "GET",
        "/v1/machines",
        "",
        &[("authorization", "Bearer wrong")],
    )
    .await;
    assert_eq!(
        (answer.status, &answer.body["code"]),
        (StatusCode::UNAUTHORIZED, &json!("unauthorized"))
    );
    assert_eq!(
        send(&router, "GET", "/healthz", "", &[]).await.body,
        json!({ "status": "ok" })
    );
    let unknown = call(&router, "GET", "/v1/nonsense", Value::Null).await;
    assert_eq!(
        (unknown.status, &unknown.body["code"]),
        (StatusCode::NOT_FOUND, &json!("not_found"))
    );
}
