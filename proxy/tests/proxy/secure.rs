//! HTTP/2, TLS, and hyper's own refusals.

use crate::support::{TestMachine, echo_guest, guest, http_proxy, proxy_of};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};
use torpor_api::http::ServiceKind;
use torpor_proxy::{ProxyConfig, Tls};

async fn h2<S>(stream: S) -> SendRequest<Full<Bytes>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    sender
}

async fn get(sender: &mut SendRequest<Full<Bytes>>, path: &str) -> (http::StatusCode, String) {
    let request = Request::get(format!("http://torpor.test{path}"))
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(Full::default())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn http_2_by_prior_knowledge_reaches_the_guest_as_http_1() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let mut sender = h2(TcpStream::connect(proxy.address()).await.unwrap()).await;
    let (status, head) = get(&mut sender, "/p?q=1").await;
    assert_eq!(status, 200);
    assert!(head.starts_with("GET /p?q=1 HTTP/1.1\r\n"), "{head}");
    assert!(
        head.contains("host: torpor.test\r\n") && head.contains("cookie: a=1; b=2\r\n"),
        "{head}"
    );
}

#[tokio::test]
async fn requests_of_one_http_2_connection_do_not_wait_for_each_other() {
    let (waits, go) = crate::support::signal();
    let script = move |mut client: crate::support::Client, _| {
        let waits = Arc::clone(&waits);
        async move {
            if client.head().await.starts_with("GET /slow ") {
                let _go = waits.acquire().await.unwrap();
            }
            client
                .send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                .await;
        }
    };
    let machine = TestMachine::at(guest(script).await);
    let proxy = http_proxy(&machine);
    let sender = h2(TcpStream::connect(proxy.address()).await.unwrap()).await;
    let slow = tokio::spawn({
        let mut sender = sender.clone();
        async move { get(&mut sender, "/slow").await }
    });
    machine.until(|machine| machine.n_fresh() == 1).await;
    assert_eq!(get(&mut sender.clone(), "/fast").await.1, "ok");
    go.add_permits(1);
    assert_eq!(slow.await.unwrap().1, "ok");
}

fn certificate(directory: &Path, name: &str) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    std::fs::write(directory.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(directory.join("cert.pem"), made.cert.pem()).unwrap();
    CertificateDer::from_pem_file(directory.join("cert.pem")).unwrap()
}

async fn tls(
    address: std::net::SocketAddr,
    trusted: CertificateDer<'static>,
    name: &'static str,
    alpn: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

async fn one_request(stream: &mut TlsStream<TcpStream>) -> String {
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let mut read = vec![0; 1000];
    let n_read = stream.read(&mut read).await.unwrap();
    String::from_utf8_lossy(&read[..n_read]).into_owned()
}

#[tokio::test]
async fn one_port_takes_tls_with_both_versions_and_plain_http_and_renews_its_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let first = certificate(directory.path(), "one.test");
    let secured = Arc::new(Tls::read(&path("cert.pem"), &path("key.pem")).unwrap());
    let config = ProxyConfig {
        tls: Some(Arc::clone(&secured)),
        ..ProxyConfig::default()
    };
    let machine = TestMachine::at(echo_guest().await);
    let proxy = proxy_of(&machine, ServiceKind::Http, config);
    let mut old = tls(proxy.address(), first.clone(), "one.test", b"http/1.1")
        .await
        .unwrap();
    assert!(one_request(&mut old).await.starts_with("HTTP/1.1 200 "));
    let stream = tls(proxy.address(), first.clone(), "one.test", b"h2")
        .await
        .unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(get(&mut h2(stream).await, "/").await.0, 200);
    let plain = proxy
        .exchange("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        .await;
    assert!(plain.starts_with("HTTP/1.1 200 "), "{plain}");

    let second = certificate(directory.path(), "two.test");
    secured.reload().unwrap();
    assert!(
        tls(proxy.address(), first.clone(), "one.test", b"h2")
            .await
            .is_err()
    );
    assert!(
        tls(proxy.address(), second.clone(), "two.test", b"h2")
            .await
            .is_ok()
    );
    assert!(
        one_request(&mut old).await.starts_with("HTTP/1.1 200 "),
        "a renewal cut a connection"
    );
    std::fs::write(path("cert.pem"), "no certificate").unwrap();
    assert!(secured.reload().is_err());
    assert!(
        tls(proxy.address(), second, "two.test", b"h2").await.is_ok(),
        "what is broken changes nothing"
    );
}

#[tokio::test]
async fn a_certificate_file_that_changes_is_noticed_at_a_handshake() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    certificate(directory.path(), "one.test");
    let config = ProxyConfig {
        tls: Some(Arc::new(Tls::read(&path("cert.pem"), &path("key.pem")).unwrap())),
        ..ProxyConfig::default()
    };
    let machine = TestMachine::at(echo_guest().await);
    let proxy = proxy_of(&machine, ServiceKind::Http, config);
    let second = certificate(directory.path(), "two.test");
    let noticed = async {
        while tls(proxy.address(), second.clone(), "two.test", b"h2")
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), noticed)
        .await
        .unwrap();
}

#[tokio::test]
async fn what_hyper_refuses_by_itself_has_the_one_error_shape() {
    let machine = TestMachine::at(echo_guest().await);
    let proxy = http_proxy(&machine);
    let long = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "x".repeat(100_000));
    for (request, status, code) in [
        ("GET\x01 / HTTP/1.1\r\n\r\n", "HTTP/1.1 400 ", "invalid_request"),
        (&long[..], "HTTP/1.1 431 ", "head_too_large"),
    ] {
        let mut client = proxy.connect().await;
        // It may be refused before it is sent whole.
        let _ = client.stream.write_all(request.as_bytes()).await;
        let (head, body) = client.response().await;
        assert!(head.starts_with(status), "{head}");
        let error: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(error["code"], code);
    }
}
