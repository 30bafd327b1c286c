//! `torpor-guest`: PID 1 of a Torpor guest, or a service under another init.
//!
//! Threads: the main thread takes signals, reaps and, in the end, halts ([`supervise`]); one thread
//! accepts and answers quick requests ([`front`]); one per slow operation ([`serve`]). All signals are
//! blocked everywhere and read from a descriptor by the main thread. As PID 1 it must not end, so
//! nothing here panics on purpose, a panic ends at most a connection, and what fails at the start is
//! logged and done without.

#![deny(unsafe_code)]

mod accounts;
mod children;
mod config;
mod errors;
mod exec;
mod files;
mod forward;
mod front;
mod hold;
mod init;
mod log;
mod mounts;
mod resync;
mod serve;
mod shutdown;
mod supervise;
mod sys;
mod threads;
mod usage;
mod wire;

use config::{Action, Address, Config};
use front::{Front, Origin};
use log::Level;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serve::Server;
use shutdown::Shutdown;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use sys::listen::Listener;
use torpor_api::guest::AGENT_PORT;

/// Descriptors that the agent itself may need: 256 operations of a handful each, and orphaned output.
const OPEN_FILES: u64 = 8192;
/// What processes get as their hard limit, if the agent may raise it.
const CHILD_OPEN_FILES: u64 = 524_288;

fn main() -> ExitCode {
    sys::process::use_one_malloc_arena();
    std::panic::set_hook(Box::new(|panic| {
        log::line(Level::Error, format_args!("defect: {panic}"))
    }));
    let is_pid_1 = std::process::id() == 1;
    let args = std::env::args_os()
        .skip(1)
        .map(|arg| arg.to_string_lossy().into_owned());
    match config::parse(args, is_pid_1) {
        Ok(Action::Serve(config)) => serve(&config),
        Ok(Action::Ask { socket, request }) => match hold::ask(&socket, &request) {
            Ok(answer) => {
                println!("{answer}");
                ExitCode::SUCCESS
            }
            Err(message) => {
                eprintln!("torpor-guest: {message}");
                ExitCode::FAILURE
            }
        },
        Ok(Action::Help) => {
            print!("{}", config::USAGE);
            ExitCode::SUCCESS
        }
        Ok(Action::Version) => {
            println!("torpor-guest {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprint!("torpor-guest: {message}\n\n{}", config::USAGE);
            ExitCode::from(2)
        }
    }
}

fn serve(config: &Config) -> ExitCode {
    let started = start(config);
    match started {
        Ok((supervisor, front)) => {
            if let Some(front) = front {
                let thread = threads::start("front", move || front.run());
                if let Err(error) = thread {
                    log::line(
                        Level::Error,
                        format_args!("cannot start the listener's thread: {error}"),
                    );
                }
            }
            if config.init {
                // The disk may be large, and nobody needs its room at once.
                let _ = threads::start("grow-root", init::grow_root);
            }
            supervisor.run(config)
        }
        Err(error) => {
            log::line(Level::Error, format_args!("cannot start: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Everything up to the moment of serving. Signals are blocked and the socket listens before anything
/// slow, so that a host that connects early waits instead of being refused.
fn start(config: &Config) -> io::Result<(supervise::Supervisor, Option<Front>)> {
    let signals = supervise::take_signals()?;
    let listener = match &config.listen {
        Address::Vsock => Listener::vsock(AGENT_PORT),
        Address::Unix(path) => Listener::unix(path),
    };
    if config.init {
        init::bring_up();
    }
    for arg in &config.ignored {
        log::line(
            Level::Warning,
            format_args!("argument {arg:?} means nothing to the agent"),
        );
    }
    let _ = sys::process::close_inherited_on_exec();
    // Orphans of background processes come here even under another init, so none is left a zombie.
    let _ = nix::sys::prctl::set_child_subreaper(true);
    let open_files = raise_open_files()?;
    let server = Arc::new(Server::new(open_files, Shutdown::new()?));
    let mut listeners = Vec::new();
    match Listener::for_everybody(&config.run_dir, hold::SOCKET) {
        Ok(inside) => listeners.push((inside, Origin::Inside)),
        Err(error) => log::line(
            Level::Warning,
            format_args!(
                "no hold can be taken: cannot listen in {}: {error}",
                config.run_dir.display()
            ),
        ),
    }
    let front = match listener {
        Ok(listener) => {
            listeners.insert(0, (listener, Origin::Host));
            Some(Front::new(listeners, Arc::clone(&server)))
        }
        // An init without a host to talk to is still an init; a service without one is nothing.
        Err(error) if config.init => {
            log::line(
                Level::Error,
                format_args!("cannot listen on {:?}: {error}", config.listen),
            );
            None
        }
        Err(error) => return Err(error),
    };
    log::line(
        Level::Info,
        format_args!("{} serves {:?}", env!("CARGO_PKG_VERSION"), config.listen),
    );
    Ok((supervise::Supervisor::new(signals, server), front))
}

/// Raise the agent's own limit; returns what children get: the old soft limit, a high hard one.
fn raise_open_files() -> io::Result<(u64, u64)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = hard.max(CHILD_OPEN_FILES);
    let hard = if setrlimit(Resource::RLIMIT_NOFILE, soft, raised).is_ok() {
        raised
    } else {
        hard
    };
    let _ = setrlimit(Resource::RLIMIT_NOFILE, soft.max(OPEN_FILES).min(hard), hard);
    Ok((soft, hard))
}
