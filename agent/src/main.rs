//! `torpord`: reads the configuration, wires the parts together, waits for a signal.
//!
//! On SIGTERM it stops accepting, lets requests in flight end for a moment, and goes; VMMs live on, and the next
//! torpord takes them over. A panic anywhere ends the process for the same reason: starting again is safe, going on
//! with half a state is not.

use anyhow::{Context, Result};
use clap::Parser;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use torpor_agent::api::{self, Token};
use torpor_agent::config::{Config, host_of};
use torpor_agent::execution::Platform;
use torpor_agent::machine::clock::SystemClock;
use torpor_agent::machine::fleet::Fleet;
use torpor_agent::machine::{leases, pre_copy, retention, room, usage};
use torpor_agent::sockets::{self, Sockets};
use torpor_agent::ssh;
use torpor_agent::store::Store;
use torpor_agent::waker::{FleetWaker, ProxyListeners};
use torpor_proxy::{Entrance, Proxy, ProxyConfig, Tls};
use torpor_ssh::Gateway;

/// How long requests in flight may take to end after a signal.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// The daemon of Torpor: machines that sleep.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file.
    #[arg(long, default_value = "/etc/torpor/torpord.toml")]
    config: PathBuf,
    /// Read the configuration, say whether it is right, and end.
    #[arg(long)]
    check_config: bool,
}

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("torpord: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<()> {
    let arguments = Arguments::parse();
    let config = Config::read(&arguments.config)?;
    if arguments.check_config {
        println!("{} is right", arguments.config.display());
        return Ok(());
    }
    // Everything torpord makes is for root alone unless it says otherwise.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    end_on_panic();
    let sockets = Sockets::inherited();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start tokio")?;
    let outcome = runtime.block_on(run(&config, &sockets));
    // Tasks of machines may wait for VMMs; nobody has to wait for them.
    runtime.shutdown_background();
    outcome
}

fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

async fn run(config: &Config, sockets: &Arc<Sockets>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    for dir in [&config.state_dir, &config.run_dir] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let _lock = lock(&config.state_dir)?;
    let token = config
        .api
        .needs_token()
        .then(|| Token::read(&config.api.token_file))
        .transpose()?;
    let store = Store::open(&config.state_dir.join("torpor.db"))?;
    let platform = Platform::start(config.platform()).await?;
    let fleet = Fleet::new(
        store,
        Arc::clone(&platform) as _,
        Arc::new(SystemClock),
        config.fleet(),
    );
    if let Some(token) = &token {
        fleet.edge().set_api_token(token.clone());
    }
    let proxy = start_proxy(config, &fleet, sockets)?;
    fleet
        .recover()
        .await
        .context("cannot take up the machines of this host")?;
    // Not before: whoever waits at these would be told that there is no such service.
    serve_host_names(config, &proxy)?;
    tokio::spawn(leases::run(fleet.clone()));
    let counting = tokio::spawn(fleet.clone().keep_grant_usage());
    tokio::spawn(retention::run(fleet.clone()));
    tokio::spawn(room::run(fleet.clone()));
    tokio::spawn(pre_copy::run(fleet.clone()));
    tokio::spawn(usage::run(fleet.clone()));

    let ended = CancellationToken::new();
    let gateway = start_ssh(config, &fleet, token.clone(), sockets)?;
    serve(config, &fleet, token, (sockets, &ended))?;
    sockets.end_the_rest();
    tracing::info!(state_dir = %config.state_dir.display(), "ready");
    // Outside systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM"),
        _ = interrupt.recv() => tracing::info!("SIGINT"),
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    ended.cancel();
    let leave = async {
        if let Some(gateway) = &gateway {
            gateway.shutdown(SHUTDOWN_GRACE).await;
        }
    };
    tokio::join!(proxy.shutdown(SHUTDOWN_GRACE), leave);
    fleet.halt().await;
    // What was counted last.
    let _ = counting.await;
    platform.stop().await;
    Ok(())
}

/// Two torpords on one state directory would undo each other's work.
fn lock(state_dir: &Path) -> Result<Flock<File>> {
    let path = state_dir.join("torpord.lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("another torpord holds {}", path.display()))
}

fn start_proxy(config: &Config, fleet: &Fleet, sockets: &Arc<Sockets>) -> Result<Arc<Proxy>> {
    let tls = match (&config.proxy.tls_cert_file, &config.proxy.tls_key_file) {
        (Some(certificate), Some(key)) => Some(Arc::new(Tls::read(certificate, key)?)),
        _ => None,
    };
    let settings = ProxyConfig {
        listen_ip: config.proxy.listen_ip,
        tls: tls.clone(),
        sockets: Arc::clone(sockets) as _,
        ..ProxyConfig::default()
    };
    let proxy = Arc::new(Proxy::new(settings, Arc::new(FleetWaker(fleet.clone()))));
    fleet
        .routes()
        .attach(Arc::new(ProxyListeners(Arc::clone(&proxy))));
    reload_on_hangup(tls)?;
    Ok(proxy)
}

fn serve_host_names(config: &Config, proxy: &Proxy) -> Result<()> {
    if let Some(address) = config.proxy.http_listen {
        proxy.serve_host_names(address, &config.proxy.domain, Entrance::PlainOrTls)?;
    }
    if let Some(address) = config.proxy.https_listen {
        proxy.serve_host_names(address, &config.proxy.domain, Entrance::Tls)?;
    }
    Ok(())
}

fn start_ssh(
    config: &Config,
    fleet: &Fleet,
    token: Option<Token>,
    sockets: &Sockets,
) -> Result<Option<Gateway>> {
    let Some(listen) = config.ssh.listen else {
        return Ok(None);
    };
    let listener = (asynchronous(sockets.tcp(listen)), listen);
    let host = host_of(listen.ip());
    Ok(Some(ssh::start_on(
        fleet,
        listener,
        host,
        &config.state_dir,
        token,
    )?))
}

fn asynchronous(listener: io::Result<std::net::TcpListener>) -> io::Result<TcpListener> {
    let listener = listener?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// SIGHUP reads the certificate again; without one it does nothing.
fn reload_on_hangup(tls: Option<Arc<Tls>>) -> Result<()> {
    let mut hangup = signal(SignalKind::hangup()).context("cannot catch SIGHUP")?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            if let Some(Err(error)) = tls.as_ref().map(|tls| tls.reload()) {
                tracing::error!(
                    error = torpor_agent::machine::error::chain(&error),
                    "certificate not read"
                );
            }
        }
    });
    Ok(())
}

fn serve(
    config: &Config,
    fleet: &Fleet,
    token: Option<Token>,
    (sockets, ended): (&Sockets, &CancellationToken),
) -> Result<()> {
    let listener = unix_listener(&config.api.unix_socket, sockets)?;
    tokio::spawn(api::serve_unix(
        listener,
        api::router(fleet.clone()),
        ended.clone().cancelled_owned(),
    ));
    let Some(token) = token else { return Ok(()) };
    let served = [
        (
            config.api.tcp_listen,
            api::router_with_token(fleet.clone(), token.clone()),
        ),
        (
            config.api.morph_listen,
            api::morph::router(fleet.clone(), token.clone()),
        ),
        (
            config.api.nullspace_listen,
            api::nullspace::router(fleet.clone(), token),
        ),
    ];
    for (address, router) in served {
        if let Some(address) = address {
            let listener =
                asynchronous(sockets.tcp(address)).with_context(|| format!("cannot listen on {address}"))?;
            drop(api::serve_tcp_on(
                listener,
                router,
                ended.clone().cancelled_owned(),
            ));
        }
    }
    Ok(())
}

fn unix_listener(path: &Path, sockets: &Sockets) -> Result<UnixListener> {
    let Some(kept) = sockets.kept_unix(path) else {
        let listener = api::bind_unix(path)?;
        sockets::keep(&listener);
        return Ok(listener);
    };
    let asynchronous = || {
        kept.set_nonblocking(true)?;
        UnixListener::from_std(kept)
    };
    asynchronous().with_context(|| format!("cannot listen on {}", path.display()))
}
