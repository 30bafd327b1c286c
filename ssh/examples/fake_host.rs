//! The gateway over a backend without machines, for trying out SSH clients:
//! `cargo run -p torpor-ssh --example fake_host -- 127.0.0.1:2222 AUTHORIZED_KEY_LINE`.
//! Machine `web`, password `the password`, API key `the-api-key`. Prints a certificate for the key, if one is given.

#[path = "../tests/gateway/fake.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    clippy::wildcard_imports,
    reason = "shared with the tests, which use more of it and may panic"
)]
mod fake;

use std::sync::Arc;
use std::time::Duration;
use torpor_ssh::{
    Authority, CertificateOrder, Gateway, GatewayConfig, KeyError, PublicKeyText, load_or_create_key,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let keys = tempfile::tempdir()?;
    let key = |name: &str| -> Result<_, KeyError> { load_or_create_key(&keys.path().join(name), name) };
    let authority = Arc::new(Authority::new(key("ca")?));
    let mut backend = fake::Fake::new();
    if let Some(line) = arguments.get(1) {
        backend.fingerprints.push(PublicKeyText::parse(line)?.fingerprint);
        let (certificate, _) = authority.certify(&CertificateOrder {
            public_key: line,
            machine: "web",
            user: "root",
            access_id: "acc_1",
            lifetime: Duration::from_secs(600),
        })?;
        println!("{certificate}");
    }
    let config = GatewayConfig {
        listen: arguments
            .first()
            .map_or("127.0.0.1:2222", String::as_str)
            .parse()?,
        host_key: key("host")?,
        authority,
        max_connections: 64,
    };
    let gateway = Gateway::start(config, Arc::new(backend)).await?;
    println!("listening on {}", gateway.address());
    tokio::signal::ctrl_c().await?;
    gateway.shutdown(Duration::from_secs(1)).await;
    Ok(())
}
