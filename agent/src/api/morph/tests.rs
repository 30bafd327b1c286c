//! The Morph API over a real store, real drivers and a simulated host.

mod exec;

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

async fn started(router: &Router, body: Value) -> Value {
    let answer = call(router, "POST", "/instance?snapshot_id=morphvm-minimal", body).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
    answer.body
}

fn nothing_said() -> Value {
    json!({ "metadata": null, "ttl_seconds": null, "ttl_action": null })
}

#[tokio::test]
async fn an_instance_keeps_one_id_for_life() {
    let world = World::new();
    let router = served(&world);
    let body = json!({ "metadata": { "a": "b" }, "ttl_seconds": 900, "ttl_action": "pause" });
    let instance = started(&router, body).await;
    let id = instance["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("morphvm_"), "{id}");
    assert_eq!(
        (
            &instance["status"],
            &instance["ttl"]["ttl_action"],
            &instance["ttl"]["ttl_seconds"]
        ),
        (&json!("ready"), &json!("pause"), &json!(900))
    );
    assert_eq!(
        instance["wake_on"],
        json!({ "wake_on_ssh": false, "wake_on_http": false })
    );
    assert_eq!(instance["metadata"], json!({ "a": "b" }));
    let path = format!("/instance/{id}");
    for (action, status) in [
        ("pause", "paused"),
        ("pause", "paused"),
        ("resume", "ready"),
        ("resume", "ready"),
    ] {
        let answer = call(&router, "POST", &format!("{path}/{action}"), Value::Null).await;
        assert_eq!(answer.status, StatusCode::OK, "{action}: {}", answer.body);
        let shown = call(&router, "GET", &path, Value::Null).await.body;
        assert_eq!(
            (&shown["id"], &shown["status"]),
            (&json!(id), &json!(status)),
            "{action}"
        );
    }
    for base in ["/api", "/api/", "//", "/instances/.."] {
        let path = format!("{base}/instance/{id}").replace("/instances/../instance", "/instances");
        assert_eq!(
            call(&router, "GET", &path, Value::Null).await.body["id"],
            json!(id),
            "{path}"
        );
    }
    let gone = call(&router, "DELETE", &path, Value::Null).await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    let shown = call(&router, "GET", &path, Value::Null).await;
    assert_eq!(
        (shown.status, &shown.body["error_code"]),
        (StatusCode::NOT_FOUND, &json!("instance_not_found"))
    );
    assert!(shown.body["detail"].is_string());
}

#[tokio::test]
async fn policies_change_in_part_and_in_any_state() {
    let world = World::new();
    let router = served(&world);
    let instance = started(&router, nothing_said()).await;
    let path = format!("/instance/{}", instance["id"].as_str().unwrap());
    assert_eq!(instance["ttl"]["ttl_seconds"], Value::Null);
    call(&router, "POST", &format!("{path}/pause"), Value::Null).await;
    for (route, body, pointer, value) in [
        (
            "wake-on",
            json!({ "wake_on_http": true }),
            "/wake_on/wake_on_http",
            json!(true),
        ),
        (
            "wake-on",
            json!({ "wake_on_ssh": true }),
            "/wake_on/wake_on_http",
            json!(true),
        ),
        (
            "ttl",
            json!({ "ttl_seconds": 60 }),
            "/ttl/ttl_action",
            json!("stop"),
        ),
        (
            "ttl",
            json!({ "ttl_seconds": 60, "ttl_action": "pause" }),
            "/ttl/ttl_action",
            json!("pause"),
        ),
        (
            "ttl",
            json!({ "ttl_seconds": 70 }),
            "/ttl/ttl_action",
            json!("pause"),
        ),
        (
            "ttl",
            json!({ "ttl_seconds": null }),
            "/ttl/ttl_seconds",
            Value::Null,
        ),
        ("metadata", json!({ "x": "y" }), "/metadata/x", json!("y")),
        (
            "http",
            json!({ "name": "agent", "port": 8080 }),
            "/networking/http_services/0/port",
            json!(8080),
        ),
        (
            "http",
            json!({ "name": "agent", "port": 8081 }),
            "/networking/http_services/0/port",
            json!(8081),
        ),
    ] {
        let answer = call(&router, "POST", &format!("{path}/{route}"), body.clone()).await;
        assert_eq!(answer.status, StatusCode::OK, "{route} {body}: {}", answer.body);
        let shown = call(&router, "GET", &path, Value::Null).await.body;
        assert_eq!(shown.pointer(pointer), Some(&value), "{route} {body}: {shown}");
        assert_eq!(shown["status"], "paused", "{route} {body}");
    }
    call(&router, "DELETE", &format!("{path}/http/agent"), Value::Null).await;
    let shown = call(&router, "GET", &path, Value::Null).await.body;
    assert_eq!(shown["networking"]["http_services"], json!([]));
}

#[tokio::test]
async fn lists_are_narrowed_and_paged() {
    let world = World::new();
    let router = served(&world);
    for team in ["a", "b", "a"] {
        let mut body = nothing_said();
        body["metadata"] = json!({ "team": team });
        started(&router, body).await;
    }
    let all = call(&router, "GET", "/instance", Value::Null).await.body;
    assert_eq!(all["data"].as_array().unwrap().len(), 3);
    let some = call(&router, "GET", "/instance?metadata%5Bteam%5D=a", Value::Null)
        .await
        .body;
    assert_eq!(some["data"].as_array().unwrap().len(), 2);
    let page = call(&router, "GET", "/instance/list?page=2&limit=2", Value::Null)
        .await
        .body;
    assert_eq!(
        (
            &page["total"],
            &page["total_pages"],
            &page["has_next"],
            &page["has_prev"]
        ),
        (&json!(3), &json!(2), &json!(false), &json!(true))
    );
    assert_eq!(page["instances"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn what_is_not_built_says_so_and_a_wrong_key_is_refused() {
    let world = World::new();
    let router = served(&world);
    for (method, path) in UNBUILT {
        let answer = call(&router, method, &path.replace(['{', '}'], ""), Value::Null).await;
        assert_eq!(
            (answer.status, &answer.body["error_code"]),
            (StatusCode::NOT_IMPLEMENTED, &json!("not_implemented")),
            "{method} {path}"
        );
    }
    for key in ["Bearer wrong", "secret", ""] {
        let answer = send(&router, "GET", "/instance", "", &[("authorization", key)]).await;
        assert_eq!(
            (answer.status, &answer.body["error_code"]),
            (StatusCode::UNAUTHORIZED, &json!("unauthorized")),
            "{key}"
        );
    }
    let missing = call(&router, "POST", "/instance?snapshot_id=nope", nothing_said()).await;
    assert_eq!(missing.status, StatusCode::NOT_FOUND, "{}", missing.body);
}

#[tokio::test]
async fn a_full_host_says_so_in_the_sdks_words() {
    let world = World::with(Settings {
        max_running_mem_mib: 700,
        wake_timeout: Duration::from_millis(50),
        ..Settings::default()
    });
    let router = served(&world);
    started(&router, nothing_said()).await;
    let full = call(&router, "POST", "/instance?snapshot_id=base", nothing_said()).await;
    assert_eq!(
        (full.status, &full.body["error_code"], &full.body["retryable"]),
        (
            StatusCode::SERVICE_UNAVAILABLE,
            &json!("capacity_exceeded"),
            &json!(true)
        )
    );
    assert!(full.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn snapshots_are_made_found_by_digest_and_gone_on_from() {
    let world = World::new();
    let router = served(&world);
    let body = json!({ "image_id": "morphvm-minimal", "vcpus": 1, "memory": 512, "disk_size": 100, "digest": "d1", "metadata": { "k": "v" } });
    let first = call(&router, "POST", "/snapshot", body.clone()).await;
    assert_eq!(first.status, StatusCode::CREATED, "{}", first.body);
    let again = call(&router, "POST", "/snapshot", body).await.body;
    assert_eq!(
        (&again["id"], &again["status"]),
        (&first.body["id"], &json!("ready"))
    );
    assert_eq!(first.body["refs"], json!({ "image_id": "base" }));
    let id = first.body["id"].as_str().unwrap();
    assert!(id.starts_with("snapshot_"), "{id}");
    let found = call(
        &router,
        "GET",
        "/snapshot?digest=d1&metadata%5Bk%5D=v",
        Value::Null,
    )
    .await
    .body;
    assert_eq!(found["data"][0]["id"], json!(id));
    let none = call(&router, "GET", "/snapshot?metadata%5Bk%5D=w", Value::Null)
        .await
        .body;
    assert_eq!(none["data"], json!([]));
    let page = call(&router, "GET", "/snapshot/list?page=1&limit=1", Value::Null)
        .await
        .body;
    assert_eq!(
        (&page["total"], &page["snapshots"][0]["id"]),
        (&json!(1), &json!(id))
    );
    let started = call(
        &router,
        "POST",
        &format!("/instance?snapshot_id={id}"),
        nothing_said(),
    )
    .await;
    assert_eq!(started.status, StatusCode::CREATED, "{}", started.body);
    assert_eq!(
        (
            &started.body["refs"]["snapshot_id"],
            &started.body["spec"]["memory"]
        ),
        (&json!(id), &json!(512))
    );
    assert_eq!(
        call(&router, "GET", "/instance", Value::Null).await.body["data"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    for (route, body, pointer, value) in [
        ("metadata", json!({ "x": "y" }), "/metadata", json!({ "x": "y" })),
        ("ttl", json!({ "ttl_seconds": 60 }), "/ttl/ttl_seconds", json!(60)),
        (
            "ttl",
            json!({ "ttl_seconds": null }),
            "/ttl/ttl_seconds",
            Value::Null,
        ),
    ] {
        call(&router, "POST", &format!("/snapshot/{id}/{route}"), body).await;
        let shown = call(&router, "GET", &format!("/snapshot/{id}"), Value::Null)
            .await
            .body;
        assert_eq!(shown.pointer(pointer), Some(&value), "{route}: {shown}");
    }
    let instance = started.body["id"].as_str().unwrap();
    let branched = call(
        &router,
        "POST",
        &format!("/instance/{instance}/branch?count=3"),
        Value::Null,
    )
    .await
    .body;
    let branches = branched["instances"].as_array().unwrap();
    assert_eq!((branches.len(), &branches[2]["status"]), (3, &json!("ready")));
    assert_eq!(branches[0]["refs"]["snapshot_id"], branched["snapshot"]["id"]);
    let path = format!("/instance/{instance}/snapshot?digest=d2");
    let taken = call(&router, "POST", &path, json!({ "metadata": { "a": "b" } }))
        .await
        .body;
    assert_eq!(
        (&taken["digest"], &taken["metadata"]),
        (&json!("d2"), &json!({ "a": "b" }))
    );
    assert_eq!(
        call(&router, "DELETE", &format!("/snapshot/{id}"), Value::Null)
            .await
            .status,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        call(&router, "GET", &format!("/snapshot/{id}"), Value::Null)
            .await
            .status,
        StatusCode::NOT_FOUND
    );
}

#[tokio::test]
async fn a_reboot_gives_up_the_memory_and_may_change_the_shape() {
    let world = World::new();
    let router = served(&world);
    let instance = started(&router, nothing_said()).await;
    let path = format!("/instance/{}", instance["id"].as_str().unwrap());
    let boots = world.host.n_boots();
    let same = call(&router, "POST", &format!("{path}/reboot"), Value::Null).await;
    assert_eq!(
        (same.status, &same.body["status"]),
        (StatusCode::OK, &json!("ready")),
        "{}",
        same.body
    );
    assert_eq!(
        (world.host.n_boots(), &same.body["id"]),
        (boots + 1, &instance["id"])
    );
    let body = json!({ "vcpus": 2, "memory": 1024, "metadata": { "a": "b" } });
    let larger = call(&router, "POST", &format!("{path}/reboot"), body).await.body;
    assert_eq!(
        larger["spec"],
        json!({ "vcpus": 2, "memory": 1024, "disk_size": instance["spec"]["disk_size"] })
    );
    assert_eq!(
        (&larger["metadata"], &larger["status"]),
        (&json!({ "a": "b" }), &json!("ready"))
    );
    let ttl = json!({ "ttl_seconds": 900, "ttl_action": "pause" });
    call(&router, "POST", &format!("{path}/ttl"), ttl).await;
    let kept = call(
        &router,
        "POST",
        &format!("{path}/reboot"),
        json!({ "ttl_seconds": 60 }),
    )
    .await;
    assert_eq!(
        (&kept.body["ttl"]["ttl_seconds"], &kept.body["ttl"]["ttl_action"]),
        (&json!(60), &json!("pause")),
        "an action that is not said stays"
    );
    for (disk_size, has) in [(4096, 4096), (1024, 4096)] {
        let body = json!({ "disk_size": disk_size });
        let grown = call(&router, "POST", &format!("{path}/reboot"), body).await;
        assert_eq!(grown.status, StatusCode::OK, "{}", grown.body);
        assert_eq!(grown.body["spec"]["disk_size"], has, "a disk never shrinks");
    }
    for body in [json!({ "vcpus": 99 }), json!({ "disk_size": 2_000_000 })] {
        let refused = call(&router, "POST", &format!("{path}/reboot"), body).await;
        assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    }
    let snapshot = call(&router, "POST", &format!("{path}/snapshot"), json!({}))
        .await
        .body;
    let boot = format!("/snapshot/{}/boot", snapshot["id"].as_str().unwrap());
    let booted = call(
        &router,
        "POST",
        &boot,
        json!({ "memory": 256, "disk_size": 8192, "ttl_seconds": 60 }),
    )
    .await;
    assert_eq!(booted.status, StatusCode::CREATED, "{}", booted.body);
    assert_eq!(
        (
            &booted.body["spec"]["memory"],
            &booted.body["spec"]["disk_size"],
            &booted.body["ttl"]["ttl_seconds"]
        ),
        (&json!(256), &json!(8192), &json!(60))
    );
}
