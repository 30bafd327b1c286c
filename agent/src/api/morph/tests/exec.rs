//! Exec, with a real guest agent.

use super::*;
use crate::inside::tests::Lab;

fn paths(lab: &Lab) -> (Router, String) {
    (served(&lab.world), format!("/instance/{}", lab.id))
}

async fn exec(router: &Router, path: &str, command: Value) -> crate::api::tests::Answer {
    let body = json!({ "command": command });
    call(router, "POST", &format!("{path}/exec"), body).await
}

#[tokio::test]
async fn one_element_is_a_line_and_several_are_a_program_with_its_arguments() {
    let lab = Lab::new().await;
    let (router, path) = paths(&lab);
    let line = exec(&router, &path, json!(["echo {1..3}; echo e >&2; exit 3"])).await;
    assert_eq!(
        line.body,
        json!({ "exit_code": 3, "stdout": "1 2 3\n", "stderr": "e\n" })
    );
    let program = exec(&router, &path, json!(["printf", "%s|", "a b", "$X", "", "*"])).await;
    assert_eq!(program.body["stdout"], "a b|$X||*|");
    let none = exec(&router, &path, json!([])).await;
    assert_eq!(none.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_program_that_is_not_there_is_an_exit_code() {
    let lab = Lab::new().await;
    let (router, path) = paths(&lab);
    let done = exec(&router, &path, json!(["no-such-program", "x"])).await;
    assert_eq!(
        (done.status, &done.body["exit_code"]),
        (StatusCode::OK, &json!(127))
    );
    let said = done.body["stderr"].as_str().unwrap();
    assert!(said.contains("no-such-program"), "{said}");
}

#[tokio::test]
async fn exec_wakes_when_ssh_does_and_conflicts_otherwise() {
    let lab = Lab::new().await;
    let (router, path) = paths(&lab);
    let wake_on = |ssh: bool| json!({ "wake_on_ssh": ssh });
    call(&router, "POST", &format!("{path}/wake-on"), wake_on(false)).await;
    call(&router, "POST", &format!("{path}/pause"), Value::Null).await;
    let refused = exec(&router, &path, json!(["true"])).await;
    assert_eq!(
        (refused.status, &refused.body["code"]),
        (StatusCode::CONFLICT, &json!("instance_paused"))
    );
    call(&router, "POST", &format!("{path}/wake-on"), wake_on(true)).await;
    let done = exec(&router, &path, json!(["echo awake"])).await;
    assert_eq!(done.body["stdout"], "awake\n", "{}", done.body);
}
