//! Files and uploads, with a real guest agent.

use super::*;
use crate::inside::tests::Lab;

/// A scratch directory, as the guest sees it, and the route of the machine.
fn paths(lab: &Lab) -> (Router, String, tempfile::TempDir) {
    let scratch = tempfile::tempdir().unwrap();
    (served(&lab.world), format!("/v1/machines/{}", lab.id), scratch)
}

#[tokio::test]
async fn what_can_be_written_as_json_can_be_read_as_json() {
    let lab = Lab::new().await;
    let (router, path, scratch) = paths(&lab);
    let file = scratch.path().join("large");
    let content = "x".repeat(9 << 20);
    let body = json!({ "path": file, "content": content, "encoding": "utf8", "user": null });
    let written = call(&router, "POST", &format!("{path}/files/write"), body).await;
    assert_eq!(
        (written.status, &written.body["size"]),
        (StatusCode::OK, &json!(9 << 20))
    );
    let body = json!({ "path": file, "encoding": "utf8", "user": null });
    let read = call(&router, "POST", &format!("{path}/files/read"), body).await;
    assert_eq!(read.status, StatusCode::OK, "{}", read.body);
    assert_eq!(read.body["content"].as_str().unwrap().len(), content.len());
}

#[tokio::test]
async fn an_upload_that_may_replace_nothing_is_refused_before_anything_is_sent() {
    let lab = Lab::new().await;
    let (router, path, scratch) = paths(&lab);
    let begin = |target: &str, conflict: &str| {
        let body = json!({
            "kind": "file", "source_kind": "restartable_file", "target_path": scratch.path().join(target),
            "content_length": 3, "conflict": conflict, "checksum_algorithm": "sha256",
            "whole_checksum_sha256": null, "metadata": {}
        });
        let (router, path) = (router.clone(), format!("{path}/uploads"));
        async move { call(&router, "POST", &path, body).await }
    };
    std::fs::write(scratch.path().join("taken"), "old").unwrap();
    let refused = begin("taken", "error").await;
    assert_eq!(
        (refused.status, &refused.body["code"]),
        (StatusCode::CONFLICT, &json!("file_upload_error"))
    );
    for (target, conflict) in [("taken", "replace"), ("free", "error")] {
        let begun = begin(target, conflict).await;
        assert_eq!(begun.status, StatusCode::CREATED, "{target}: {}", begun.body);
    }
}
