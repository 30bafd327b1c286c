//! `torpor-vmm`: runs one virtual machine, as torpord tells it over a socket that it inherits.

use std::os::fd::OwnedFd;
use std::process::ExitCode;
use torpor_vmm::control::{self, Confinement};
use torpor_vmm::vm::chain;

const USAGE: &str = "\
Usage: torpor-vmm [--no-seccomp] [--log-file PATH]
       torpor-vmm inspect IMAGE

Runs one virtual machine. torpord starts it with a listening control socket as standard
input; started by hand it does nothing of use.

  inspect IMAGE    print the header of a hibernation image as JSON
  --no-seccomp     do not restrict system calls (debugging)
  --log-file PATH  append the log to PATH instead of standard error
  --version        print the version
  --help           print this";

enum Command {
    Serve {
        confinement: Confinement,
        log: Option<String>,
    },
    Inspect(String),
    Print(String),
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut confinement = Confinement::Seccomp;
    let mut log = None;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--help" | "-h" => return Ok(Command::Print(USAGE.to_owned())),
            "--version" | "-V" => {
                return Ok(Command::Print(format!(
                    "torpor-vmm {}",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            "--no-seccomp" => confinement = Confinement::None,
            "--log-file" => log = Some(arguments.next().ok_or("--log-file needs a path")?),
            "inspect" => {
                return arguments
                    .next()
                    .map(Command::Inspect)
                    .ok_or("inspect needs an image".to_owned());
            }
            other => return Err(format!("unknown argument {other:?}; see torpor-vmm --help")),
        }
    }
    Ok(Command::Serve { confinement, log })
}

fn inspect(path: &str) -> Result<(), String> {
    let file = std::fs::File::open(path).map_err(|e| format!("cannot open {path}: {e}"))?;
    let header = torpor_vmm::image::read_header(&file).map_err(|e| format!("{path}: {}", chain(&e)))?;
    let json = serde_json::to_string_pretty(&header).map_err(|e| e.to_string())?;
    println!("{json}");
    Ok(())
}

fn start_log(path: Option<&str>) -> Result<(), String> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_ansi(false)
        .with_target(false);
    match path {
        None => builder.with_writer(std::io::stderr).init(),
        Some(path) => {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            builder
                .with_writer(file.map_err(|e| format!("cannot open {path}: {e}"))?)
                .init();
        }
    }
    Ok(())
}

/// A thread that panics would leave the guest half served: end the process instead.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!(%panic, "defect");
        std::process::abort();
    }));
}

fn serve(confinement: Confinement, log: Option<&str>) -> Result<u8, String> {
    torpor_vmm::sys::process::use_one_heap();
    // The guest's memory is in no core dump of ours.
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)
        .map_err(|e| format!("cannot forbid core dumps: {e}"))?;
    start_log(log)?;
    abort_on_panic();
    let listener: OwnedFd = torpor_vmm::sys::process::inherited_listener()
        .map_err(|e| format!("standard input is no listening socket: {e}"))?;
    // A signal to the terminal that torpord may have been started from is not for a machine. Fails if it is so already.
    let _ = nix::unistd::setsid();
    let code = control::serve(listener, confinement).map_err(|e| chain(&e))?;
    Ok(u8::try_from(code).unwrap_or(1))
}

fn main() -> ExitCode {
    let result = match parse(std::env::args().skip(1)) {
        Err(message) => Err(message),
        Ok(Command::Print(text)) => {
            println!("{text}");
            Ok(0)
        }
        Ok(Command::Inspect(path)) => inspect(&path).map(|()| 0),
        Ok(Command::Serve { confinement, log }) => serve(confinement, log.as_deref()),
    };
    match result {
        // The machine's threads are not waited for: nothing of theirs outlives the process.
        Ok(code) => torpor_vmm::sys::process::exit_now(code.into()),
        Err(message) => {
            eprintln!("torpor-vmm: {message}");
            ExitCode::FAILURE
        }
    }
}
