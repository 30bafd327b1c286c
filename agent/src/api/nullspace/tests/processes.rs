//! Processes and terminals, with a real guest agent.

use super::*;
use crate::inside::tests::Lab;

fn paths(lab: &Lab) -> (Router, String) {
    (served(&lab.world), format!("/v1/machines/{}", lab.id))
}

async fn background(router: &Router, path: &str, line: &str) -> u64 {
    let exec = json!({ "command": line, "shell": true, "timeout_secs": 1, "background": true });
    let started = call(router, "POST", &format!("{path}/exec"), exec).await;
    assert_eq!(started.status, StatusCode::OK, "{}", started.body);
    started.body["pid"].as_u64().unwrap()
}

#[tokio::test]
async fn a_process_that_has_ended_can_be_killed_and_one_that_never_was_cannot() {
    let lab = Lab::new().await;
    let (router, path) = paths(&lab);
    let pid = background(&router, &path, "true").await;
    let logs = format!("{path}/processes/{pid}/logs");
    while call(&router, "GET", &logs, Value::Null)
        .await
        .body
        .get("exit_code")
        .is_none()
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for (pid, status) in [(pid, StatusCode::NO_CONTENT), (4_000_000, StatusCode::NOT_FOUND)] {
        let killed = call(
            &router,
            "POST",
            &format!("{path}/processes/{pid}/kill"),
            Value::Null,
        )
        .await;
        assert_eq!(killed.status, status, "{}", killed.body);
    }
}

#[tokio::test]
async fn what_is_no_process_is_refused_in_the_sdks_shape() {
    let lab = Lab::new().await;
    let (router, path) = paths(&lab);
    for (pid, status, code) in [
        ("4000000", StatusCode::NOT_FOUND, "process_not_found"),
        ("-1", StatusCode::BAD_REQUEST, "invalid_request"),
        ("x", StatusCode::BAD_REQUEST, "invalid_request"),
    ] {
        let stdin = format!("{path}/processes/{pid}/stdin");
        let refused = call(&router, "POST", &stdin, json!({ "data": "" })).await;
        assert_eq!(
            (refused.status, &refused.body["code"]),
            (status, &json!(code)),
            "{pid}"
        );
    }
}

#[tokio::test]
async fn processes_and_terminals_are_listed_of_a_machine_that_slept() {
    let lab = Lab::new().await;
    let (router, path) = paths(&lab);
    let pid = background(&router, &path, "sleep 60").await;
    for list in ["processes", "pty"] {
        call(&router, "POST", &format!("{path}/hibernate"), Value::Null).await;
        let listed = call(&router, "GET", &format!("{path}/{list}"), Value::Null).await;
        assert_eq!(listed.status, StatusCode::OK, "{list}: {}", listed.body);
    }
    let listed = call(&router, "GET", &format!("{path}/processes"), Value::Null).await;
    assert_eq!(
        listed.body[0],
        json!({ "pid": pid, "command": "sleep 60", "running": true })
    );
}
