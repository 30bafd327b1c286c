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
