//! Snapshots and forks.

use super::*;

#[tokio::test]
async fn snapshots_are_taken_listed_and_gone_on_from() {
    let world = World::new();
    let router = served(&world);
    let id = created_id(&router, resuming()).await;
    let path = format!("/v1/machines/{id}");
    let taken = call(&router, "POST", &format!("{path}/snapshots"), Value::Null).await;
    assert_eq!(taken.status, StatusCode::CREATED, "{}", taken.body);
    assert_eq!(taken.body["machine_id"], json!(id));
    let snapshot = taken.body["id"].as_str().unwrap().to_owned();
    let body = json!({
        "snapshot_id": snapshot, "timeout_ms": 60_000, "auto_resume": false, "metadata": {}, "network": null, "volumes": null
    });
    let child = created(&router, body).await;
    assert_eq!(
        (&child["config"]["memory_mb"], &child["status"]),
        (&json!(512), &json!("running"))
    );
    let fork = call(&router, "POST", &format!("{path}/fork"), Value::Null).await;
    assert_eq!(
        (fork.status, &fork.body["status"]),
        (StatusCode::CREATED, &json!("running"))
    );
    assert_ne!(fork.body["id"], json!(id));
    let pause = call(&router, "POST", &format!("{path}/hibernate"), Value::Null)
        .await
        .body;
    let pause = pause["id"].as_str().unwrap();
    let list = call(
        &router,
        "GET",
        &format!("/v1/snapshots?machine_id={id}"),
        Value::Null,
    )
    .await
    .body;
    let ids: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["id"].clone())
        .collect();
    assert_eq!(ids, [json!(snapshot), json!(pause)]);
    let all = call(&router, "GET", "/v1/snapshots", Value::Null).await.body;
    assert_eq!(all, list);
    world.clock.advance(Duration::from_secs(60));
    let shown = call(&router, "GET", &format!("/v1/snapshots/{pause}"), Value::Null).await;
    assert_eq!(
        (shown.status, &shown.body["machine_id"], &shown.body["created_at"]),
        (StatusCode::OK, &json!(id), &json!("2023-11-14T22:13:20.000Z"))
    );
    let kept = call(&router, "DELETE", &format!("/v1/snapshots/{pause}"), Value::Null).await;
    assert_eq!(
        (kept.status, &kept.body["code"]),
        (StatusCode::CONFLICT, &json!("snapshot_in_use"))
    );
    let mut body = plain();
    body["snapshot_id"] = json!(pause);
    let refused = call(&router, "POST", "/v1/machines", body).await;
    assert_eq!(
        (refused.status, &refused.body["code"]),
        (StatusCode::CONFLICT, &json!("snapshot_in_use"))
    );
    let resumed = call(
        &router,
        "POST",
        &format!("/v1/machines/{pause}/resume"),
        Value::Null,
    )
    .await;
    assert_eq!(
        (resumed.status, &resumed.body["status"]),
        (StatusCode::OK, &json!("running"))
    );
    for gone in [pause, "snap_x"] {
        let answer = call(&router, "GET", &format!("/v1/snapshots/{gone}"), Value::Null).await;
        assert_eq!(answer.body["code"], "snapshot_not_found", "{gone}");
    }
    let deleted = call(
        &router,
        "DELETE",
        &format!("/v1/snapshots/{snapshot}"),
        Value::Null,
    )
    .await;
    assert_eq!(deleted.status, StatusCode::NO_CONTENT);
    let list = call(&router, "GET", "/v1/snapshots?machine_id=mch_nope", Value::Null)
        .await
        .body;
    assert_eq!(list, json!([]));
}
