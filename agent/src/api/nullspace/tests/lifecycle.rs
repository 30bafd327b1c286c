//! Lifecycle events, of machines that are there and of those that are gone.

use super::*;

async fn operations(router: &Router, id: &str) -> Vec<String> {
    let path = format!("/v1/machines/{id}/lifecycle?order=asc");
    let answer = call(router, "GET", &path, Value::Null).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
    let events = answer.body["events"].as_array().unwrap().iter();
    events
        .map(|event| event["operation"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn a_machine_that_is_gone_is_asked_about_by_any_id_it_had() {
    let world = World::new();
    let router = served(&world);
    let old = created_id(&router, resuming()).await;
    let path = format!("/v1/machines/{old}");
    call(&router, "POST", &format!("{path}/hibernate"), Value::Null).await;
    let resumed = call(&router, "POST", &format!("{path}/resume"), Value::Null).await;
    let new = resumed.body["id"].as_str().unwrap().to_owned();
    call(&router, "DELETE", &path, Value::Null).await;
    let wanted = ["create", "hibernate", "resume_from_snapshot", "destroy"];
    assert_eq!(operations(&router, &old).await, wanted);
    assert_eq!(operations(&router, &new).await, wanted);
    let unknown = "/v1/machines/mch_aaaaaaaaaaaaaaaaaaaa/lifecycle";
    let answer = call(&router, "GET", unknown, Value::Null).await;
    assert_eq!(
        (answer.status, &answer.body["code"]),
        (StatusCode::NOT_FOUND, &json!("machine_not_found"))
    );
}

#[tokio::test]
async fn a_fork_names_both_machines() {
    let world = World::new();
    let router = served(&world);
    let source = created(&router, resuming()).await["id"].clone();
    let path = format!("/v1/machines/{}", source.as_str().unwrap());
    let fork = call(&router, "POST", &format!("{path}/fork"), Value::Null).await;
    let events = call(
        &router,
        "GET",
        &format!("{path}/lifecycle?operation=fork"),
        Value::Null,
    )
    .await;
    let event = &events.body["events"][0];
    assert_eq!(
        (
            &event["machine_id"],
            &event["source_machine_id"],
            &event["target_machine_id"]
        ),
        (&source, &source, &fork.body["id"])
    );
}

/// IDs of the events that a query of the host's finds, newest first.
async fn found(router: &Router, query: &str) -> Vec<String> {
    let answer = call(
        router,
        "GET",
        &format!("/v1/lifecycle/events?{query}"),
        Value::Null,
    )
    .await;
    assert_eq!(answer.status, StatusCode::OK, "{query}: {}", answer.body);
    let events = answer.body["events"].as_array().unwrap().iter();
    events
        .map(|event| event["id"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn events_are_found_by_both_ids_of_a_resume() {
    let world = World::new();
    let router = served(&world);
    created(&router, resuming()).await;
    let old = created_id(&router, resuming()).await;
    let path = format!("/v1/machines/{old}");
    call(&router, "POST", &format!("{path}/hibernate"), Value::Null).await;
    let resumed = call(&router, "POST", &format!("{path}/resume"), Value::Null).await;
    let new = resumed.body["id"].as_str().unwrap();
    let resumes = found(&router, "operation=resume_from_snapshot").await;
    assert_eq!(resumes.len(), 1);
    assert_eq!(found(&router, &format!("source_machine_id={old}")).await, resumes);
    assert_eq!(found(&router, &format!("target_machine_id={new}")).await, resumes);
    let none = found(&router, &format!("target_machine_id={old}")).await;
    assert!(none.is_empty(), "{none:?}");
}

#[tokio::test]
async fn events_are_found_by_time_however_it_is_written() {
    let world = World::new();
    let router = served(&world);
    created(&router, resuming()).await;
    // The simulated clock stands at 2023-11-14T22:13:20Z.
    for (query, n_found) in [
        ("from=2023-11-14T22:13:20Z", 1),
        ("to=2023-11-14T22:13:20Z", 1),
        ("from=2023-11-14T22:13:20.000001Z", 0),
        ("to=2023-11-14T22:13:19.999999Z", 0),
        ("from=2023-11-15T03:43:20%2B05:30", 1),
        ("from=2023-11-15T03:43:21%2B05:30", 0),
        ("to=2023-11-14T14:13:20.000000-08:00", 1),
        ("to=2023-11-14T14:13:19-08:00", 0),
    ] {
        assert_eq!(found(&router, query).await.len(), n_found, "{query}");
    }
    for query in ["from=yesterday", "to=", "from=2023-11-14T22:13:20"] {
        let path = format!("/v1/lifecycle/events?{query}");
        let refused = call(&router, "GET", &path, Value::Null).await;
        assert_eq!(
            (refused.status, &refused.body["code"]),
            (StatusCode::BAD_REQUEST, &json!("invalid_request")),
            "{query}"
        );
    }
}
