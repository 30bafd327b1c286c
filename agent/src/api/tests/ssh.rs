//! Keys, registered keys and certificates through the API.

use super::*;
use crate::machine::fleet::Fleet;
use std::net::{Ipv4Addr, SocketAddr};

async fn with_gateway(world: &World) -> torpor_ssh::Gateway {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let fleet: &Fleet = &world.fleet;
    crate::ssh::start(
        fleet,
        listen,
        "127.0.0.1".to_owned(),
        world.directory.path(),
        None,
    )
    .await
    .unwrap()
}

const PUBLIC_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti me@here";

#[tokio::test]
async fn a_machines_key_is_made_once_and_rotated_on_request() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    let path = format!("/v1/machines/{id}/ssh-key");
    let first = call(&router, "GET", &path, Value::Null).await;
    assert_eq!(first.status, StatusCode::OK, "{}", first.body);
    for field in ["private_key", "public_key", "fingerprint", "password"] {
        assert!(!first.body[field].as_str().unwrap().is_empty(), "{field}");
    }
    assert_eq!(call(&router, "GET", &path, Value::Null).await.body, first.body);
    let second = call(&router, "POST", &path, Value::Null).await;
    assert_eq!(second.status, StatusCode::OK, "{}", second.body);
    for field in ["private_key", "public_key", "fingerprint", "password"] {
        assert_ne!(second.body[field], first.body[field], "{field}");
    }
    assert_eq!(call(&router, "GET", &path, Value::Null).await.body, second.body);
    let unknown = call(&router, "GET", "/v1/machines/nobody/ssh-key", Value::Null).await;
    assert_refused(&unknown, 404, "machine_not_found", "unknown machine");
}

#[tokio::test]
async fn keys_are_registered_listed_renamed_and_removed() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let body = json!({ "public_key": PUBLIC_KEY });
    let added = call(&router, "POST", "/v1/ssh-keys", body.clone()).await;
    assert_eq!(added.status, StatusCode::CREATED, "{}", added.body);
    assert_eq!(
        (&added.body["name"], &added.body["public_key"]),
        (&json!("me@here"), &json!(PUBLIC_KEY))
    );
    let again = call(&router, "POST", "/v1/ssh-keys", body).await;
    assert_eq!(again.body, added.body, "the same key is registered once");
    let path = format!("/v1/ssh-keys/{}", added.body["id"].as_str().unwrap());
    let renamed = call(&router, "PATCH", &path, json!({ "name": "laptop" })).await;
    assert_eq!(renamed.body["name"], "laptop");
    assert_eq!(call(&router, "GET", &path, Value::Null).await.body, renamed.body);
    let list = call(&router, "GET", "/v1/ssh-keys", Value::Null).await;
    assert_eq!(list.body["ssh_keys"], json!([renamed.body]));
    assert_eq!(
        call(&router, "DELETE", &path, Value::Null).await.status,
        StatusCode::NO_CONTENT
    );
    for method in ["GET", "DELETE"] {
        let gone = call(&router, method, &path, Value::Null).await;
        assert_refused(&gone, 404, "ssh_key_not_found", method);
    }
    for bad in [
        json!({}),
        json!({ "public_key": "x" }),
        json!({ "public_key": PUBLIC_KEY, "name": "\n" }),
    ] {
        let refused = call(&router, "POST", "/v1/ssh-keys", bad.clone()).await;
        assert_refused(&refused, 400, "invalid_request", &bad.to_string());
    }
}

#[tokio::test]
async fn a_certificate_says_where_to_go_and_until_when() {
    let world = World::new();
    let router = router(world.fleet.clone());
    let (id, _) = created(&router).await;
    let path = format!("/v1/machines/{id}/ssh-access");
    let body = json!({ "public_key": PUBLIC_KEY, "expires_in_minutes": 5 });
    let disabled = call(&router, "POST", &path, body.clone()).await;
    assert_refused(&disabled, 409, "ssh_disabled", "no gateway");
    let gateway = with_gateway(&world).await;
    let access = call(&router, "POST", &path, body).await;
    assert_eq!(access.status, StatusCode::CREATED, "{}", access.body);
    let port = gateway.address().port();
    assert_eq!(access.body["port"], port);
    assert_eq!(access.body["command"], format!("ssh -p {port} root@127.0.0.1"));
    let certificate = access.body["certificate"].as_str().unwrap();
    assert!(
        certificate.starts_with("ssh-ed25519-cert-v01@openssh.com AAAA"),
        "{certificate}"
    );
    assert!(
        access.body["host_key"]
            .as_str()
            .unwrap()
            .starts_with("ssh-ed25519 AAAA")
    );
    let place = call(&router, "GET", "/v1/ssh", Value::Null).await;
    assert_eq!(place.body["host_key"], access.body["host_key"]);
    for bad in [
        json!({ "public_key": PUBLIC_KEY, "expires_in_minutes": 0 }),
        json!({ "public_key": PUBLIC_KEY, "expires_in_minutes": 61 }),
        json!({ "public_key": PUBLIC_KEY, "user": "" }),
        json!({ "public_key": PUBLIC_KEY, "user": "-oProxyCommand=x" }),
        json!({ "public_key": "ssh-rsa x" }),
        json!({ "expires_in_minutes": 5 }),
    ] {
        let refused = call(&router, "POST", &path, bad.clone()).await;
        assert_refused(&refused, 400, "invalid_request", &bad.to_string());
    }
}
